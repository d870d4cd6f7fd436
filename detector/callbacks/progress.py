"""A progress bar that shows the four losses on one line."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

SHORT_NAMES = {
    "train/loss_rpn_cls": "rpn_cls",
    "train/loss_rpn_reg": "rpn_reg",
    "train/loss_roi_cls": "roi_cls",
    "train/loss_roi_reg": "roi_reg",
    "train/loss": "loss",
}


class LossProgressBar(TQDMProgressBar):
    """Lightning's bar with short names of the losses, as many digits as matter, and no version number."""

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar."""
        metrics: dict[str, Any] = {
            SHORT_NAMES.get(name, name): value
            for name, value in super().get_metrics(trainer, pl_module).items()
            if name != "v_num" and not name.endswith("_epoch")
        }
        return metrics
