"""The base class of callbacks that draw pictures of a validation."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from detector.drawing import GROUND_TRUTH_COLOR, LegendEntry, draw_boxes, with_legend
from detector.training.callbacks.inside_steps import InsideSteps
from detector.training.loggers import picture_writers

VIEW_WIDTH: Final = 400
"""Pixels: the width of TensorBoard's cards. Smaller images are enlarged to it, and captions and lines are so sized."""
LARGEST_SIDE: Final = 2048  # pixels: a log of many larger pictures is too large for TensorBoard
OBJECT: Final = LegendEntry("object", GROUND_TRUTH_COLOR)
DIFFICULT: Final = LegendEntry("difficult", GROUND_TRUTH_COLOR, dashed=True)


class ValidationPictures(InsideSteps):
    """Say in which validations pictures are due, and give them to the loggers that take pictures.

    Nothing is due without such a logger, or on another process than the first.

    Args:
        images: How many images; 0: no pictures.
        every_n_validations: How often; the first validation is always drawn.
    """

    def __init__(self, images: int, every_n_validations: int) -> None:
        super().__init__(every_n_steps=0)
        self.images = images
        self.every_n_validations = every_n_validations
        self._validations = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count."""
        self._validations += not trainer.sanity_checking

    def due_on_all(self, trainer: pl.Trainer) -> bool:
        """Return whether this validation is drawn, by the first process, whichever this one is."""
        chosen = (self._validations - 1) % self.every_n_validations == 0
        return bool(self.images and chosen and not trainer.sanity_checking and picture_writers(trainer))

    def due(self, trainer: pl.Trainer) -> bool:
        """Return whether this process draws pictures of this validation."""
        return trainer.is_global_zero and self.due_on_all(trainer)

    def log_picture(self, trainer: pl.Trainer, tag: str, picture: Tensor) -> None:
        """Give a picture (3, H, W) to the loggers."""
        array = picture.permute(1, 2, 0).numpy()
        for write in picture_writers(trainer):
            write(tag, array, trainer.global_step)


class Outline(NamedTuple):
    """A box (x1, y1, x2, y2) in pixels of the image, how it looks, and its caption, "" for none."""

    box: Sequence[float]
    look: LegendEntry
    caption: str = ""


def sketch(image: Tensor, outlines: Sequence[Outline], legend: Sequence[LegendEntry], title: str = "") -> Tensor:
    """Return a picture (3, H', W') of an image (3, H, W) with outlines, the last on top, and a legend below."""
    picture = draw_boxes(
        image,
        torch.tensor([outline.box for outline in outlines], dtype=torch.float32).view(-1, 4),
        [outline.caption for outline in outlines],
        [outline.look.color for outline in outlines],
        [outline.look.dashed for outline in outlines],
        max_side=LARGEST_SIDE,
        view_width=VIEW_WIDTH,
        thin=[outline.look.thin for outline in outlines],
    )
    return with_legend(picture, legend, VIEW_WIDTH, title)


def outlines_of_objects(target: Mapping[str, Any], class_names: Sequence[str]) -> list[Outline]:
    """Return the outlines of an image's objects with their classes as captions."""
    rows = zip(target["boxes"].tolist(), target["labels"].tolist(), target["difficult"].tolist(), strict=True)
    return [Outline(box, DIFFICULT if hard else OBJECT, class_names[label - 1]) for box, label, hard in rows]
