"""The only place that touches what is private in Lightning: there is no public way to any of it.

Looked up in the sources of pytorch-lightning 2.6.0 and 2.6.6; for another version this file alone is to be checked.
"""

import pytorch_lightning as pl


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


def put_off_sigterm(trainer: pl.Trainer, put_off: bool, waiting: bool) -> bool:
    """Let SIGTERM, which ends a training after a batch, wait for the end of an optimiser step.

    Args:
        trainer: Its handler has noted the signal.
        put_off: Whether an optimiser step is under way.
        waiting: Whether a signal has been put off, as returned last.
    """
    signals = trainer._signal_connector
    if put_off and signals.received_sigterm:
        signals.received_sigterm = False
        return True
    if waiting and not put_off:
        signals.received_sigterm = True
        return False
    return waiting


def start_new_epoch(trainer: pl.Trainer) -> None:
    """Take a checkpoint of an epoch's end for one, as Lightning itself does under `max_epochs`.

    Under `max_steps` it runs one epoch without batches, which shifts all epoch numbers by one.
    """
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current
    if loop.restarting and epochs.ready == epochs.started == epochs.processed:  # type: ignore[attr-defined]
        loop._restarting = False
        loop.epoch_loop.restarting = False
