"""How far a cell of a grid is, for the table of `frcnn ablate`."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from detector.files import write_json
from experiments.run.folder import AXES_VARIABLE


class CellProgress(pl.Callback):
    """Write `cell.progress.json` into the run folder: step, steps, and the last validation's `val/AP50_voc07`.

    Args:
        folder: The run folder.
        seconds: At most so often, but after every validation.
    """

    def __init__(self, folder: str | Path, seconds: float = 2.0) -> None:
        self.path = Path(folder) / "cell.progress.json"
        self.seconds = seconds
        self._written = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write now and then."""
        if time.monotonic() - self._written > self.seconds:
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the metric."""
        if not trainer.sanity_checking:
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        self._written = time.monotonic()
        value = float(trainer.callback_metrics.get("val/AP50_voc07", math.nan))
        steps = trainer.estimated_stepping_batches
        content = {
            "step": trainer.global_step,
            "steps": int(steps) if math.isfinite(steps) else None,
            "val/AP50_voc07": value if math.isfinite(value) else None,
        }
        with contextlib.suppress(OSError):  # a full disk ends a training at its checkpoint, not here
            write_json(self.path, content, indent=None)


def axes_of_environment() -> Mapping[str, str | int]:
    """Return the axes of the grid's cell that this run is; empty if it is none."""
    axes: dict[str, str | int] = json.loads(os.environ.get(AXES_VARIABLE, "{}"))
    return axes
