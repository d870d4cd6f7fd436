"""How many anchors and RoIs the detector learns from, and how many of them are positive."""

from typing import Final

import pytorch_lightning as pl
import torch
from torch import Tensor

from detector.kernels.transfers import constant
from detector.step_record import StepRecord
from detector.training.callbacks.inside_steps import InsideSums, log_scalars
from detector.training.lightning_module import FasterRCNNModule

NAMES: Final = ("rpn_positives", "rpn_negatives", "roi_positives", "roi_negatives")


class SampleCounts(InsideSums):
    """Log the samples per image as `train_samples/rpn_positives`, `rpn_negatives`, `roi_positives`, `roi_negatives`.

    Means over the images of the steps since the last log. Few positives of the RPN tell of anchors that do not fit, few
    of the RoI heads of proposals that do not. Steps of alternating training have one pair each. Costs four small
    kernels a step that it sees, and one transfer to the host per log.

    Args:
        every_n_steps: How often to see inside a step, in optimiser steps; 0: never.
        log_every_n_steps: How often to log.
    """

    def __init__(self, every_n_steps: int = 1, log_every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps, log_every_n_steps)

    def sums_of(self, pl_module: FasterRCNNModule, record: StepRecord) -> Tensor:
        """Return the sums of `NAMES`, then the images with samples of the RPN and of the RoI heads, (6,)."""
        anchors, rois, logits = record.sampled_anchors, record.sampled_rois, record.level_logits[0]
        positives, negatives = (sum(len(drawn[kind]) for drawn in anchors) for kind in (0, 1))
        labels = torch.cat([drawn.labels for drawn in rois]) if rois else logits.new_zeros(0)
        objects = (labels > 0).sum()
        of_rpn, images = (constant(of, logits.float()) for of in ((positives, negatives), (len(anchors), len(rois))))
        return torch.cat((of_rpn, torch.stack((objects, len(labels) - objects)), images))

    def log_sums(self, trainer: pl.Trainer, pl_module: FasterRCNNModule, sums: Tensor) -> None:
        """Log the means of what was sampled."""
        images = sums[[4, 4, 5, 5]]
        means = zip(NAMES, sums[:4].tolist(), images.tolist(), strict=True)
        log_scalars(trainer, {f"train_samples/{name}": value / number for name, value, number in means if number})
