"""Approximate joint training (Ren et al. 2015, section 3.2): one network, all four losses in every step.

Its class is also what `FasterRCNNModule` asks of any training scheme, and what another one derives from.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor

from detector.faster_rcnn import FasterRCNN

SchemeName = Literal["joint", "alternating"]


class JointTraining:
    """A training of the whole detector in one stage: what a step computes, for how long, and what is saved.

    Parameters are optimised where they require a gradient, which is for a scheme to set.
    """

    name: SchemeName = "joint"

    def __init__(self, model: FasterRCNN) -> None:
        self._model = (model,)  # so that it is no submodule of a scheme that is a module

    @property
    def model(self) -> FasterRCNN:
        """Return the detector."""
        return self._model[0]

    @property
    def detects(self) -> bool:
        """Return whether there is a network that detects, and not only proposes."""
        return True

    @property
    def is_final(self) -> bool:
        """Return whether a validation now is of the network that the training ends with."""
        return True

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the losses of a step and their weighted sum; see `FasterRCNN.losses`."""
        return self.model.losses(images, targets)

    def detect(self, images: Sequence[Tensor]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Return detections and proposals; see `FasterRCNN.forward`."""
        found: tuple[list[dict[str, Tensor]], list[Tensor]] = self.model(images)
        return found

    def logged(self) -> Mapping[str, float]:
        """Return what is logged beside the losses, by name."""
        return self.model.roi_heads.matcher.logged()

    def steps(self, trainer: pl.Trainer) -> float:
        """Return how many steps the optimiser at work has, those included that were done before a resume.

        The same as Lightning's estimate where the resume has changed nothing.
        """
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps) or trainer.max_epochs in (None, -1) or math.isinf(trainer.num_training_batches):
            return steps
        loop, of_step = trainer.fit_loop, trainer.accumulate_grad_batches
        per_epoch = math.ceil(trainer.num_training_batches / of_step)
        epochs = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        within = loop.epoch_loop.batch_progress.current.ready if loop.epoch_progress.current.started > epochs else 0  # type: ignore[attr-defined]
        left = per_epoch * (max(trainer.max_epochs or 1, 1) - epochs) - math.ceil(within / of_step)
        total: float = trainer.global_step + max(left, 0)
        return total if trainer.max_steps == -1 else min(total, trainer.max_steps)

    def check_endless(self) -> None:
        """Raise InputError if the scheme has to know how long it trains."""

    def start(self) -> None:
        """Begin or go on, after a checkpoint has been restored."""

    def advance(self, module: pl.LightningModule) -> None:
        """Before a batch, go on to the next stage where it is due."""

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what is needed beside the weights."""

    def restore(self, checkpoint: Mapping[str, Any], module: pl.LightningModule | None = None) -> None:
        """Go to the stage of a checkpoint before its weights are loaded; `module`: that is to be trained."""

    def check_whole(self, path: object) -> None:
        """Raise InputError, which begins with `path`, unless there is one network that detects."""
