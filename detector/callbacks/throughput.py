"""Images per second, logged while training."""

import time
from typing import Any

import pytorch_lightning as pl


class Throughput(pl.Callback):
    """Log `train/images_per_second` of all devices together, over the steps since the last log, validation excluded.

    Args:
        every_n_steps: How often; Lightning writes it at its own next log.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps
        self._images = 0
        self._seconds = 0.0
        self._last = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; loading the first batch counts."""
        self._last = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock after a validation in the middle of an epoch."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        now = time.perf_counter()
        self._images += len(batch[0])
        self._seconds += now - self._last
        self._last = now
        if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
            rate = self._images * trainer.world_size / max(self._seconds, 1e-9)
            pl_module.log("train/images_per_second", rate, batch_size=len(batch[0]))
            self._images, self._seconds = 0, 0.0
