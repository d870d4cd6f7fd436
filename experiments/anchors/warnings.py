"""Warnings at the start of a training of what an anchor audit would warn of."""

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl

from detector.anchors import AnchorConfig
from detector.image_batch import ImageConfig
from detector.rpn import RPNConfig
from detector.training.callbacks.anchor_telemetry import AnchorTelemetry
from experiments.anchors.audit import AuditResult, audit
from experiments.anchors.coverage import Array

logger = logging.getLogger(__name__)


class AnchorWarnings(pl.Callback):
    """Audit the anchors on some training images, and print what is wrong in short lines on stderr.

    Where the run has `AnchorTelemetry`, tell it the share of positives that each anchor should get.

    Never stops a training: where the audit is not possible, nothing is said.

    Args:
        images: At most so many, evenly spread over the training images.
        seconds: No more images are looked at after this time (a slow disk).
    """

    def __init__(self, images: int = 1000, seconds: float = 1.0) -> None:
        self.images = images
        self.seconds = seconds

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the warnings, once for all processes."""
        if not trainer.is_global_zero:
            return
        try:
            dataset = trainer.datamodule.train_dataset  # type: ignore[attr-defined]
            model: Any = pl_module.model
            anchors, rpn = model.rpn.anchor_generator.config, model.rpn.config
            about = anchors, model.backbone.strides, model.image_config, rpn, model.difficult
            result = audit_dataset(dataset, *about, self.images, self.seconds)
            part = "" if result.images == len(dataset) else f" (from {result.images} of {len(dataset)} images)"
            lines = [f"warning: {line}{part}" for line in result.warnings]
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, AnchorTelemetry) and not result.other_matcher:
                    callback.expected = [anchor.positive_share for anchor in result.anchors]
        except Exception:
            logger.debug("no anchor audit at the start of this training", exc_info=True)
            return
        if lines:
            print("\n".join(lines), "(all numbers: frcnn anchors --config ...)", sep="\n", file=sys.stderr)


def audit_dataset(
    dataset: Any,
    anchors: AnchorConfig,
    strides: Sequence[int],
    image: ImageConfig,
    rpn: RPNConfig,
    difficult: str,
    images: int = 1000,
    seconds: float = 1.0,
) -> AuditResult:
    """Audit anchors on some images of a `DetectionDataset`.

    Args:
        dataset: Of the training.
        anchors: The detector's anchors.
        strides: Pixels per cell of its levels.
        image: Its sizes of images.
        rpn: Its rules for positive anchors.
        difficult: Its treatment of difficult objects.
        images: At most so many, evenly spread.
        seconds: No more images are looked at after this time (a slow disk).
    """
    step = max(1, -(-len(dataset) // images))
    deadline = time.monotonic() + seconds
    sizes: list[Array] = []
    boxes: list[Array] = []
    owners: list[int] = []
    for index in range(0, len(dataset), step):
        if sizes and time.monotonic() > deadline:
            break
        target = dataset.target(index)
        kept = target["boxes"] if difficult == "keep" else target["boxes"][~target["difficult"]]
        owners += [len(sizes)] * len(kept)
        boxes.append(kept.numpy())
        sizes.append(dataset.sizes[index])
    return audit(anchors, strides, image, np.array(sizes), np.concatenate(boxes), np.array(owners, np.int64), rpn=rpn)
