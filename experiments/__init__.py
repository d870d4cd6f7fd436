"""What a user does with the detector: the `frcnn` command and its parts."""

from experiments.run import former_paths

former_paths.install()
