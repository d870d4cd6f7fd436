"""The base class of callbacks that see inside a step: anchors, matches, samples, proposals, predictions."""

from typing import Any

import pytorch_lightning as pl

from detector.step_record import StepRecord, ask


class InsideSteps(pl.Callback):
    """See inside every n-th optimiser step, and inside the batches of a validation that are wanted.

    Override `see_training`, and for validations `wants_validation_batch` and `see_validation`. A step whose gradients
    are accumulated is seen batch by batch. Records are free until something is computed from them; other steps cost
    nothing.

    Args:
        every_n_steps: How often, in optimiser steps; 0: never.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._record: StepRecord | None = None

    def see_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: StepRecord, batch: Any) -> None:
        """Use the record of a batch that was trained on."""

    def wants_validation_batch(self, trainer: pl.Trainer, batch: Any) -> bool:
        """Return whether to see inside the evaluation of a batch."""
        return False

    def see_validation(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: StepRecord, batch: Any
    ) -> None:
        """Use the record of a batch that was evaluated."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to record where the step is due."""
        if self.every_n_steps and (trainer.global_step + 1) % self.every_n_steps == 0:
            self._record = ask()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand over what was recorded."""
        if (record := self._closed()) is not None:
            self.see_training(trainer, pl_module, record, batch)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Begin to record where the batch is wanted."""
        if not trainer.sanity_checking and self.wants_validation_batch(trainer, batch):
            self._record = ask()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand over what was recorded."""
        if (record := self._closed()) is not None:
            self.see_validation(trainer, pl_module, record, batch)

    def _closed(self) -> StepRecord | None:
        record, self._record = self._record, None
        if record is not None:
            record.close()
        return record
