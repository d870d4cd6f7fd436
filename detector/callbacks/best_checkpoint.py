"""The checkpoint of the best validation."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from detector.lightning_module import FasterRCNNModule


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback, which looks only at validations of the network that the training is to end with.

    In the first three steps of an alternating training a validation is of other networks: it saves nothing.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the run's own best checkpoint, also where the run has been moved.

        A new run, which starts from another's checkpoint, has none, and the other's is left alone.
        """
        own = Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}"
        if own.is_file():
            score, path = state_dict["best_model_score"], str(own)
            kept = {path: score} if state_dict["best_k_models"] else {}
            moved = {
                "dirpath": self.dirpath,
                "best_k_models": kept,
                "kth_best_model_path": path,
                "best_model_path": path,
            }
            super().load_state_dict(state_dict | moved)

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
