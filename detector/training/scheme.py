"""The training scheme: what distinguishes joint from alternating training, and is the same for Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor, nn

from detector.rpn import RegionProposalNetwork

SchemeName = Literal["joint", "alternating"]


class TrainingScheme:
    """A way to train a detector: what a step computes, how long it goes on, and what happens at a stage's end.

    Parameters are optimised where they require a gradient, which is for the scheme to set. Where a method is defined
    here, it is that of a training in one stage.
    """

    name: SchemeName

    @property
    def detects(self) -> bool:
        """Whether there is a network that detects, and not only proposes."""
        return True

    @property
    def is_final(self) -> bool:
        """Whether a validation now is of the network that the training ends with."""
        return True

    @property
    def proposing(self) -> Sequence[tuple[nn.Module, RegionProposalNetwork]]:
        """Each network's backbone and RPN, the detector's first."""
        raise NotImplementedError

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the losses of a step and their weighted sum; see `FasterRCNN.losses`."""
        raise NotImplementedError

    def detect(self, images: Sequence[Tensor]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Return detections and proposals; see `FasterRCNN.forward`."""
        raise NotImplementedError

    def logged(self) -> Mapping[str, float]:
        """Return what is logged beside the losses, by name."""
        return {}

    def steps(self, trainer: pl.Trainer) -> float:
        """Return how many steps the optimiser at work and its schedule have, those of before a resume included."""
        raise NotImplementedError

    def check_endless(self) -> None:
        """Raise InputError if a training without a known length is not possible."""

    def start(self) -> None:
        """Begin or go on, after a checkpoint has been restored."""

    def advance(self, module: pl.LightningModule) -> None:
        """Before a batch, go on to the next stage where it is due."""

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what is needed beside the weights."""

    def restore(self, checkpoint: Mapping[str, Any], module: pl.LightningModule | None = None) -> None:
        """Go to the stage of a checkpoint before its weights are loaded; in training, `module` is trained."""

    def check_whole(self, path: object) -> None:
        """Raise InputError, which begins with `path`, unless there is one network that detects."""
