"""The only place that touches what is private in Lightning: there is no public way to any of it.

Looked up in the sources of pytorch-lightning 2.6.0 and 2.6.6; for another version this file alone is to be checked.
"""

from collections.abc import Callable

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the module's trainer or None; `module.trainer` raises an error where there is none."""
    return module._trainer


def forget_logged(trainer: pl.Trainer) -> None:
    """Forget what was logged in this epoch, or losses that are no longer computed would be logged until its end."""
    if trainer._results is not None:
        trainer._results.reset()


def log_at_step(trainer: pl.Trainer, step: int) -> None:
    """Let an evaluation log at an optimiser step; without a training Lightning logs at step 0."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def step_of_logs(trainer: pl.Trainer) -> int:
    """Return the step at which Lightning logs at this moment."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether a validation or the end of the epoch comes before the next batch: Lightning cannot resume there.

    It would leave out a validation in the middle of an epoch.
    """
    loop = trainer.fit_loop.epoch_loop
    return trainer.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """Return the signal by which SLURM announces that a job is to go back into its queue; None where it is not to."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        return int(environment.requeue_signal)
    return None


def when_a_process_fails(act: Callable[[], object]) -> None:
    """Let this be called, in a thread, when a process that the trainer has started ends with a failure.

    Lightning itself would kill all of them there, the first one included, which then cannot say why.
    """
    _ChildProcessObserver._terminate_all = lambda self: act()  # type: ignore[method-assign, assignment]


def start_new_epoch(trainer: pl.Trainer) -> None:
    """Take a checkpoint of an epoch's end for one, as Lightning itself does under `max_epochs`.

    Under `max_steps` it runs one epoch without batches, which shifts all epoch numbers by one.
    """
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current
    if loop.restarting and epochs.ready == epochs.started == epochs.processed:  # type: ignore[attr-defined]
        loop._restarting = False
        loop.epoch_loop.restarting = False
