"""Images per second and memory, logged while training."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch


class Throughput(pl.Callback):
    """Log `train/images_per_second` of all devices together, over the steps since the last log, validation excluded.

    At the end of every epoch the loggers also get `train/peak_memory_mib`: the most memory that the first process has
    held so far, on its GPU where it has one, else on the host. It is not among the run's metrics.

    Args:
        every_n_steps: How often; Lightning writes it at its own next log.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps
        self._images = 0
        self._seconds = 0.0
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, also where a training goes on in the middle of an epoch; loading a first batch counts."""
        self._last = time.perf_counter()

    on_train_epoch_start = on_validation_end = on_train_start

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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the memory."""
        if trainer.is_global_zero:
            memory = {"train/peak_memory_mib": peak_memory(pl_module.device)}
            for logger in trainer.loggers:
                logger.log_metrics(memory, trainer.global_step)


def peak_memory(device: torch.device) -> float:
    """Return the most memory held so far, in MiB: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
