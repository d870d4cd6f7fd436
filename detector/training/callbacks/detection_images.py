"""A fixed set of validation images in loggers: detections, and what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from detector.errors import printable
from detector.metrics.error_breakdown import break_down_errors
from detector.metrics.voc_ap import Detections, GroundTruth
from detector.training.callbacks.mistakes import draw_mistakes
from detector.training.callbacks.validation_pictures import (
    DIFFICULT,
    OBJECT,
    Outline,
    ValidationPictures,
    outlines_of_objects,
    sketch,
)
from detector.training.lightning_module import FasterRCNNModule
from detector.use.drawing import LegendEntry, class_color


class DetectionImages(ValidationPictures):
    """Log two pictures of each of the first validation images, the same ones in each run and validation.

    `val_images/<file name>` shows the objects, difficult ones dashed, and the detections with class and score, coloured
    by class. `val_mistakes/<file name>` shows which of these detections are right, and the mistakes by kind: wrong
    class, badly placed, both, duplicate, background, and objects that are missed, as `frcnn evaluate` defines them.
    Both leave out detections below `score_threshold`: an object that only these find is missed here.

    In TensorBoard and in all other loggers that take pictures; without one nothing is drawn. Costs about 10 ms a
    picture of 400 pixels.

    Args:
        images: How many; 0: no pictures.
        score_threshold: Detections below this score are not drawn.
        every_n_validations: Which validations are drawn: see `DrawnValidations`.
    """

    def __init__(self, images: int = 8, score_threshold: float = 0.5, every_n_validations: int | None = None) -> None:
        super().__init__(images, every_n_validations)
        self.score_threshold = score_threshold

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images of this batch that belong to the set."""
        if not self.due(trainer):
            return
        assert isinstance(pl_module, FasterRCNNModule)
        # Rank r holds images r, r + world size, ...: the first rank draws its share of the first images.
        for image, target, detections in zip(*batch, outputs["detections"], strict=True):
            if int(target["image_id"]) < self.images:
                name = printable(target["file_name"])
                self.log_picture(
                    trainer, f"val_images/{name}", self.draw(image, target, detections, pl_module.class_names)
                )
                mistakes = self.draw_mistakes(image, target, detections, pl_module.class_names)
                self.log_picture(trainer, f"val_mistakes/{name}", mistakes)

    def draw(
        self,
        image: Tensor,
        target: Mapping[str, Any],
        detections: Mapping[str, Tensor],
        class_names: Sequence[str],
    ) -> Tensor:
        """Return a picture (3, H', W') uint8 of an image (3, H, W) with its objects and detections."""
        outlines = outlines_of_objects(target, class_names)
        found = zip(*(detections[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
        for box, label, score in reversed([row for row in found if row[2] >= self.score_threshold]):
            name = class_names[label - 1]
            outlines.append(Outline(box, LegendEntry(name, class_color(name)), f"{name} {score:.2f}"))
        names = sorted({outline.look.text for outline in outlines[len(target["boxes"]) :]})
        drawn = [LegendEntry(name, class_color(name)) for name in names]
        title = f"detections with a score of at least {self.score_threshold:g}"
        return sketch(image, outlines, [OBJECT, DIFFICULT, *drawn], title)

    def draw_mistakes(
        self,
        image: Tensor,
        target: Mapping[str, Any],
        detections: Mapping[str, Tensor],
        class_names: Sequence[str],
    ) -> Tensor:
        """Return a picture (3, H', W') uint8 of an image (3, H, W) with what is wrong and what is right."""
        box, label, score = (detections[key].cpu().numpy() for key in ("boxes", "labels", "scores"))
        found = Detections(np.zeros(len(label), np.int64), label, score, box)
        found = found.take(score >= self.score_threshold)
        boxes, labels, difficult = (target[key].cpu().numpy() for key in ("boxes", "labels", "difficult"))
        objects = GroundTruth(np.zeros(len(labels), np.int64), labels, boxes, difficult.astype(np.bool_))
        errors = break_down_errors(found, objects, np.union1d(found.label, labels).tolist())
        title = f"mistakes with a score of at least {self.score_threshold:g}"
        return draw_mistakes(image, found, objects, errors, np.ones(len(found), np.bool_), class_names, title)
