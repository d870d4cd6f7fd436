"""The base classes of callbacks that see inside a step: anchors, matches, samples, proposals, predictions."""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from detector.step_record import StepRecord, ask
from detector.training.lightning_module import FasterRCNNModule


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

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of what was recorded of a step that failed."""
        self._closed()

    def _closed(self) -> StepRecord | None:
        record, self._record = self._record, None
        if record is not None:
            record.close()
        return record


class InsideSums(InsideSteps):
    """Add up numbers from inside of steps on the device, and log the sums over all processes now and then.

    Override `sums_of` and `log_sums`. Numbers come to the host once per log. Nothing here touches random numbers.

    Args:
        every_n_steps: How often to see inside a step, in optimiser steps; 0: never.
        log_every_n_steps: How often to log.
    """

    def __init__(self, every_n_steps: int, log_every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.log_every_n_steps = log_every_n_steps
        self._sums: Tensor | None = None
        self._logged = 0

    def sums_of(self, pl_module: FasterRCNNModule, record: StepRecord) -> Tensor:
        """Return the numbers of a batch, on its device, always of the same shape."""
        raise NotImplementedError

    def log_sums(self, trainer: pl.Trainer, pl_module: FasterRCNNModule, sums: Tensor) -> None:
        """Log the sums over the batches since the last log, which are on the CPU; called on the first process alone."""
        raise NotImplementedError

    def see_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: StepRecord, batch: Any) -> None:
        """Add the batch."""
        assert isinstance(pl_module, FasterRCNNModule)
        sums = self.sums_of(pl_module, record)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand over what was recorded, and log where that is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        if self._sums is not None and step > self._logged and step % self.log_every_n_steps == 0:
            self._logged = step
            sums, self._sums = trainer.strategy.reduce(self._sums.clone(), reduce_op="sum"), None
            if trainer.is_global_zero:
                assert isinstance(pl_module, FasterRCNNModule) and isinstance(sums, Tensor)
                self.log_sums(trainer, pl_module, sums.cpu())


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float], step: int | None = None) -> None:
    """Give scalars to all loggers, by default at the step at which the losses of the last step are logged.

    They do not become metrics of the run.
    """
    for logger in trainer.loggers:
        logger.log_metrics(scalars, max(trainer.global_step - 1, 0) if step is None else step)
