"""A progress bar that shows the four losses on one line."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import convert_inf

from detector.faster_rcnn import LOSS_NAMES

SHORT_NAMES = {f"train/{name}": name.removeprefix("loss_") for name in (*LOSS_NAMES, "loss")}


class LossProgressBar(TQDMProgressBar):
    """Lightning's bar with short names of the losses, as many digits as matter, and no version number."""

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_start(self, *args: Any) -> None:
        """Draw the bar of a training that goes on in the middle of an epoch, whose start Lightning leaves out."""
        super().on_train_start(*args)
        trainer: pl.Trainer = args[0]
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.fit_loop.restarted_mid_epoch or trainer.fit_loop.restarted_on_epoch_end:
            bar = self.train_progress_bar
            bar.reset(convert_inf(self.total_train_batches))
            bar.initial = bar.n = done  # the rate, and so the time left, is that of the batches from here on
            bar.set_description(f"Epoch {trainer.current_epoch}")

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar."""
        metrics: dict[str, Any] = {
            SHORT_NAMES.get(name, name): value
            for name, value in super().get_metrics(trainer, pl_module).items()
            if name != "v_num" and not name.endswith("_epoch")
        }
        return metrics
