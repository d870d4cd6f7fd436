"""What the process that forks the commands of cells imports once."""

from experiments.run.startup import quick_imports

with quick_imports():  # what is left out of collections stays shared between the forked processes, too
    import torch.utils.tensorboard  # noqa: F401

    import experiments.run.lightning_cli  # noqa: F401
