"""The base class of callbacks that draw pictures of a validation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from detector.training.callbacks.inside_steps import InsideSteps
from detector.training.loggers import picture_writers
from detector.use.drawing import GROUND_TRUTH_COLOR, LegendEntry, draw_boxes, with_legend

VIEW_WIDTH: Final = 400
"""Pixels: the width of TensorBoard's cards. Smaller images are enlarged to it, and captions and lines are so sized."""
MOST_DRAWN: Final = 10  # validations of a training
IMAGES_BETWEEN: Final = 1000  # evaluated
LARGEST_SIDE: Final = 2048  # pixels: a log of many larger pictures is too large for TensorBoard
OBJECT: Final = LegendEntry("object", GROUND_TRUTH_COLOR)
DIFFICULT: Final = LegendEntry("difficult", GROUND_TRUTH_COLOR, dashed=True)


class DrawnValidations:
    """Say which validations of a training are drawn, the same in each run: the first, each n-th, and the last.

    The last is not known where time, `EarlyStopping` or Ctrl-C ends the training.

    Args:
        every_n_validations: n; None: such that 1,000 evaluated images lie between, because the pictures of a set take
            as long as 50 images of a small network, and that there are about ten in a training.

    Attributes:
        due: Whether the validation that began last is drawn.
    """

    def __init__(self, every_n_validations: int | None) -> None:
        self.every_n_validations = every_n_validations
        self.due = False
        self._before = 0

    def begin(self, trainer: pl.Trainer) -> None:
        """Count a validation."""
        if trainer.sanity_checking:
            self.due = False
            return
        batches = trainer.val_check_batch  # None: time decides; not finite: nobody knows the length of an epoch
        known = trainer.state.fn == "fit" and batches is not None and math.isfinite(batches)
        steps = trainer.estimated_stepping_batches if known else math.inf
        between = (batches or 1) * (trainer.check_val_every_n_epoch or 1) / trainer.accumulate_grad_batches
        validations = steps / between if math.isfinite(steps) else 0
        usual = math.ceil(max(1, IMAGES_BETWEEN / _images(trainer), validations / MOST_DRAWN))
        is_last = trainer.global_step + between > steps
        self.due = is_last or self._before % (self.every_n_validations or usual) == 0
        self._before += 1


def validation_data(trainer: pl.Trainer) -> Any:
    """Return the dataset of a validation; None where it has none."""
    loaders: Any = trainer.val_dataloaders
    return getattr(loaders[0] if isinstance(loaders, list | tuple) else loaders, "dataset", None)


def _images(trainer: pl.Trainer) -> float:
    try:
        return max(1, len(validation_data(trainer)))
    except TypeError:  # nobody knows
        return math.inf


class ValidationPictures(InsideSteps):
    """Say in which validations pictures are due, and give them to the loggers that take pictures.

    Nothing is due without such a logger, or on another process than the first.

    Args:
        images: How many images; 0: no pictures.
        every_n_validations: See `DrawnValidations`.
    """

    def __init__(self, images: int, every_n_validations: int | None) -> None:
        super().__init__(every_n_steps=0)
        self.images = images
        self.drawn = DrawnValidations(every_n_validations)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether pictures are due."""
        self.drawn.begin(trainer)

    def due_on_all(self, trainer: pl.Trainer) -> bool:
        """Return whether this validation is drawn, by the first process, whichever this one is."""
        return bool(self.images and self.drawn.due and picture_writers(trainer))

    def due(self, trainer: pl.Trainer) -> bool:
        """Return whether this process draws pictures of this validation."""
        return trainer.is_global_zero and self.due_on_all(trainer)

    def log_picture(self, trainer: pl.Trainer, tag: str, picture: Tensor) -> None:
        """Give a picture (3, H, W) to the loggers."""
        array = picture.permute(1, 2, 0).numpy()
        for write in picture_writers(trainer, photos=True):
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
