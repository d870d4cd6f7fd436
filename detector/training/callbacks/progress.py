"""How far a run is, on one line: a bar on a terminal, a line a minute elsewhere, and a line for each validation."""

import math
import sys
import time
from collections import deque
from collections.abc import Collection
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar, Timer
from torch import Tensor

from detector.faster_rcnn import LOSS_NAMES
from detector.training.lightning_module import FasterRCNNModule
from detector.training.progress_line import ProgressLine, elapsed, rate, time_left

RECENT: Final = 20  # batches that losses and rates are means of


class LossProgressBar(ProgressBar):
    """Show epoch, step, time left, images per second and losses of a training, or how far an evaluation is.

    Losses are means of the last 20 steps of the first process; images are those of all processes. The time left is
    that of the whole training, at the pace since its start or resume, validations included. After each validation a
    line with the main metrics and the losses stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._line: ProgressLine | None = None
        self._trained_since = (0.0, 0)  # when, and at which step
        self._evaluated_since = 0.0
        self._steps = math.inf
        self._batches: deque[tuple[float, int]] = deque(maxlen=RECENT + 1)  # when each ended, and its images
        self._losses: deque[dict[str, Tensor]] = deque(maxlen=RECENT)

    def disable(self) -> None:
        """Show nothing from here on."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress from here on."""
        self._enabled = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock."""
        super().setup(trainer, pl_module, stage)
        self._line = ProgressLine(sys.stdout)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Take the bar away."""
        if self._line is not None:
            self._line.close()
        self._line = None

    on_exception = teardown

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the training begins or goes on."""
        self._trained_since = (time.monotonic(), trainer.global_step)
        self._steps = trainer.estimated_stepping_batches
        self._batches.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the training."""
        assert isinstance(pl_module, FasterRCNNModule)
        self._losses.append(pl_module.last_losses)
        self._batches.append((time.monotonic(), len(batch[0]) * trainer.world_size))
        if self._line is not None and self._enabled and self._line.due():
            parts = ["  ".join(self._place(trainer)), *self._time_left(trainer), *self._rate(), *self._mean_losses()]
            self._line.show(parts, trainer.global_step / self._steps if math.isfinite(self._steps) else None)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of an evaluation."""
        self._evaluated_since = time.monotonic()
        self._batches.clear()

    on_sanity_check_start = on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the evaluation."""
        self._batches.append((time.monotonic(), len(batch[0]) * trainer.world_size))
        if self._line is not None and self._enabled and self._line.due():
            assert trainer.state.stage is not None
            what, batches = {
                "sanity_check": ("sanity check", trainer.num_sanity_val_batches),
                "validate": ("validation", trainer.num_val_batches),
                "test": ("test", trainer.num_test_batches),
            }[trainer.state.stage.value]
            done, total = batch_idx + 1, sum(batches) if isinstance(batches, list) else batches
            left = time_left(time.monotonic() - self._evaluated_since, done, total)
            self._line.show([f"{what} {done}/{total}", left, *self._rate()], done / total)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the line of a validation within a training."""
        self._batches.clear()
        if self._line is None or not self._enabled or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = [f"{name} {values[name]:.3f}" for name in main_metrics(values, "val")]
        shown = [text.removeprefix("val/").removeprefix("proposal_") for text in shown]
        self._line.say([*self._place(trainer), *shown, *self._mean_losses()])

    def _place(self, trainer: pl.Trainer) -> list[str]:
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        steps = f"/{self._steps:.0f}" if math.isfinite(self._steps) else ""
        return [f"epoch {trainer.current_epoch + 1}{epochs}", f"step {trainer.global_step}{steps}"]

    def _time_left(self, trainer: pl.Trainer) -> list[str]:
        """Return how long the rest of the steps takes, or what a time limit leaves."""
        since, first = self._trained_since
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        left = [seconds for timer in timers if (seconds := timer.time_remaining()) is not None]
        if trainer.global_step > first and math.isfinite(self._steps):
            pace = (time.monotonic() - since) / (trainer.global_step - first)
            left.append(pace * (self._steps - trainer.global_step))
        return [f"{elapsed(max(0.0, min(left)))} left"] if left else []

    def _rate(self) -> list[str]:
        if len(self._batches) < 2:
            return []
        seconds = self._batches[-1][0] - self._batches[0][0]
        images = sum(images for _, images in self._batches) - self._batches[0][1]
        return [f"{rate(images / max(seconds, 1e-9))} images/s"]

    def _mean_losses(self) -> list[str]:
        parts = []
        for name in ("loss", *LOSS_NAMES):
            values = [losses[name].float() for losses in self._losses if name in losses]
            if values and name in self._losses[-1]:  # the steps of an alternating training have losses of their own
                parts.append(f"{name.removeprefix('loss_')} {torch.stack(values).mean():.3f}")
        return parts


def main_metrics(names: Collection[str], stage: str) -> list[str]:
    """Return the names of those that one line has room for: two average precisions and a recall of proposals.

    Args:
        names: Of all metrics.
        stage: `val` or `test`.
    """
    recalls = {int(name.partition("@")[2]): name for name in names if name.startswith(f"{stage}/proposal_recall@")}
    recall = recalls.get(300, recalls[max(recalls)] if recalls else "")
    return [name for name in (f"{stage}/AP50_voc07", f"{stage}/AP", recall) if name in names]
