"""Approximate joint training (Ren et al. 2015, section 3.2): one network, all four losses in every step."""

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from detector.faster_rcnn import FasterRCNN
from detector.rpn import RegionProposalNetwork
from detector.training.scheme import SchemeName, TrainingScheme


class JointTraining(TrainingScheme):
    """All of a detector trained at once, from the beginning to the end.

    Args:
        model: The detector.
    """

    name: SchemeName = "joint"

    def __init__(self, model: FasterRCNN) -> None:
        self.model = model

    @property
    def proposing(self) -> Sequence[tuple[nn.Module, RegionProposalNetwork]]:
        """The detector's backbone and RPN."""
        return [(self.model.backbone, self.model.rpn)]

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return all four losses and their weighted sum."""
        return self.model.losses(images, targets)

    def detect(self, images: Sequence[Tensor]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Return the detector's detections and proposals."""
        detections, proposals = self.model(images)
        return detections, proposals

    def steps(self, trainer: pl.Trainer) -> float:
        """Return the optimiser steps of the whole training, those included that were done with other batches.

        The same as Lightning's estimate where a resume has changed nothing.
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
