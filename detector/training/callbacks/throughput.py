"""Speed and memory, logged while training."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch

from detector.training.callbacks.inside_steps import log_scalars


class Throughput(pl.Callback):
    """Log `train/images_per_second` of all devices together, over the steps since the last log, validation excluded.

    At the same steps the loggers get, of the first process, `train_time/data_wait_ms` and `train_time/compute_ms`: how
    long a batch was waited for, its way to the device and other callbacks included, and how long it was trained on; and
    `train_time/gpu_utilization` (0..1, of the time since the driver last sampled it) where NVIDIA's `pynvml` tells it.
    A GPU works behind the program: what it does not finish within a batch counts where the program next waits for it.

    At the end of every epoch they also get `train/peak_memory_mib`: the most memory that the first process has
    held so far, on its GPU where it has one, else on the host. It is not among the run's metrics.

    Args:
        every_n_steps: How often, in batches; Lightning writes the first at its own next log; 0: nothing is logged.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps
        self._images = 0
        self._batches = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, also where a training goes on in the middle of an epoch; loading a first batch counts."""
        self._last = time.perf_counter()

    on_train_epoch_start = on_validation_end = on_train_start

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the batch was waited for."""
        self._waited += time.perf_counter() - self._last

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        now = time.perf_counter()
        self._images += len(batch[0])
        self._batches += 1
        self._seconds += now - self._last
        self._last = now
        if self.every_n_steps and ((batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch):
            rate = self._images * trainer.world_size / max(self._seconds, 1e-9)
            pl_module.log("train/images_per_second", rate, batch_size=len(batch[0]))
            if trainer.is_global_zero:
                waited, computed = (1000 * t / self._batches for t in (self._waited, self._seconds - self._waited))
                times = {"train_time/data_wait_ms": waited, "train_time/compute_ms": computed}
                log_scalars(trainer, times | gpu_utilization(trainer.strategy.root_device))
            self._images, self._batches, self._seconds, self._waited = 0, 0, 0.0, 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the memory."""
        if self.every_n_steps and trainer.is_global_zero:
            memory = {"train/peak_memory_mib": peak_memory(pl_module.device)}
            for logger in trainer.loggers:
                logger.log_metrics(memory, trainer.global_step)


def gpu_utilization(device: torch.device) -> dict[str, float]:
    """Return the share of time that a GPU is busy, under the name by which it is logged; nothing where none tells."""
    try:
        return {"train_time/gpu_utilization": torch.cuda.utilization(device) / 100} if device.type == "cuda" else {}
    except Exception:  # there is no pynvml, no NVIDIA driver, or a card that it does not know
        return {}


def peak_memory(device: torch.device) -> float:
    """Return the most memory held so far, in MiB: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
