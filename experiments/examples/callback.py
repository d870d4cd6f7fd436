"""A callback whose state is in checkpoints, so that a training that goes on counts on."""

from typing import Any

import pytorch_lightning as pl


class ImagesSeen(pl.Callback):
    """Log `train/images_seen`, over all parts of a training.

    Args:
        every: Steps between two values.
    """

    def __init__(self, every: int = 1) -> None:
        self.every, self.images = every, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Count the images of the batch, on all devices."""
        self.images += trainer.world_size * len(args[1][0])
        if trainer.global_step % self.every == 0:
            pl_module.log("train/images_seen", float(self.images))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"images": self.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from a checkpoint."""
        self.images = state_dict["images"]
