"""What is trained: the parts of the network and the numbers of their parameters."""

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from detector.training.lightning_module import FasterRCNNModule


class NetworkSummary(pl.Callback):
    """Say before a training how many parameters each part of the detector has, and how many of them are trained."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it once."""
        assert isinstance(pl_module, FasterRCNNModule)
        parts = {**dict(pl_module.model.named_children()), "detector": pl_module.model}
        names = max(len(type(part).__name__) for part in parts.values())
        rank_zero_info(f"{'part':9}  {'class':{names}}  {'parameters':>11}  {'trained':>11}")
        for name, part in parts.items():
            trained = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
            rank_zero_info(f"{name:9}  {type(part).__name__:{names}}  {_size(part):11,}  {trained:11,}")


def _size(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
