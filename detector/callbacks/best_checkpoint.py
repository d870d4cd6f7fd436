"""The checkpoint of the best validation."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from detector.lightning_module import FasterRCNNModule


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback, which looks only at validations of the network that the training is to end with.

    In the first three steps of an alternating training a validation is of other networks: it saves nothing.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after an epoch's validation."""
        if _is_candidate(pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation."""
        if _is_candidate(pl_module):
            super().on_validation_end(trainer, pl_module)


def _is_candidate(pl_module: pl.LightningModule) -> bool:
    assert isinstance(pl_module, FasterRCNNModule)
    return pl_module.is_candidate
