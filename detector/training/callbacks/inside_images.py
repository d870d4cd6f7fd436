"""What the detector learns from and proposes on a few validation images: positive anchors, proposals, sampled RoIs."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Final

import pytorch_lightning as pl
from torch import Tensor

from detector.boxes import pairwise_iou
from detector.errors import printable
from detector.image_batch import to_original
from detector.sampling import POSITIVE
from detector.step_record import StepRecord, ask, unrecorded
from detector.training.callbacks.validation_losses import losses_of_image
from detector.training.callbacks.validation_pictures import (
    DIFFICULT,
    OBJECT,
    Outline,
    ValidationPictures,
    outlines_of_objects,
    sketch,
)
from detector.training.lightning_module import FasterRCNNModule
from detector.use.drawing import GROUND_TRUTH_COLOR, LegendEntry, class_color, palette_color

_BEFORE: Final = 50  # proposals that are drawn
_AFTER: Final = 10
_ANCHORS: Final = 60
_GREY: Final = (150, 150, 150)
_HIT: Final = LegendEntry("on an object (IoU 0.5)", (0, 210, 120))
_ELSEWHERE: Final = LegendEntry("elsewhere", (255, 150, 0))


class InsideImages(ValidationPictures):
    """Log three pictures of each of the very first validation images, the same ones in each run and validation.

    - `val_inside/<file name>/anchors`: the anchors that are positive in training, in the colours of their objects;
      those that are so only as the best of an object are dashed;
    - `.../proposals`: the best 50 proposals before NMS, and of those after NMS the best 10, by whether they lie on an
      object;
    - `.../rois`: the RoIs that are sampled in training, by class.

    Anchors and RoIs are those of `losses_of_image`: matched and drawn as in training, from as many proposals, with
    draws that follow from the image alone; the proposals in the second picture are the validation's. With test-time
    augmentation all are the first view's. Costs about 15 ms a picture of 400 pixels.

    Args:
        images: How many; 0: no pictures.
        every_n_validations: Which validations are drawn: see `DrawnValidations`.
    """

    def __init__(self, images: int = 2, every_n_validations: int | None = None) -> None:
        super().__init__(images, every_n_validations)

    def wants_validation_batch(self, trainer: pl.Trainer, batch: Any) -> bool:
        """Return whether there is an image of the set."""
        return self.due(trainer) and any(int(target["image_id"]) < self.images for target in batch[1])

    def see_validation(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: StepRecord, batch: Any
    ) -> None:
        """Draw the images of this batch that belong to the set."""
        assert isinstance(pl_module, FasterRCNNModule)
        names = pl_module.class_names
        for index, (image, target) in enumerate(zip(*batch, strict=True)):
            if int(target["image_id"]) >= self.images:
                continue
            with trainer.precision_plugin.val_step_context(), unrecorded(), closing(ask()) as learned:
                losses_of_image(pl_module.model, record, index, target)
            matcher = pl_module.model.rpn.matcher
            rule = matcher.positive_from, matcher.measure
            pictures = {
                "anchors": draw_anchors(image, target, learned, names, *rule),
                "proposals": draw_proposals(image, target, record, index),
            }
            if learned.sampled_rois:
                pictures["rois"] = draw_rois(image, target, learned, names)
            for name, picture in pictures.items():
                self.log_picture(trainer, f"val_inside/{printable(target['file_name'])}/{name}", picture)


def draw_anchors(
    image: Tensor,
    target: Mapping[str, Any],
    learned: StepRecord,
    class_names: Sequence[str],
    positive_from: float,
    measure: str = "IoU",
) -> Tensor:
    """Return a picture (3, H', W') of an image's positive anchors and objects, each pair in one colour.

    Anchors are positive from an overlap on, or below it as the best of their objects; where it is 0, by other rules.
    """
    assert learned.batch is not None
    (matches,) = learned.anchor_matches
    rescued = matches.rescued(positive_from)
    positives = (matches.kind == POSITIVE).nonzero().flatten()
    shown = positives[matches.iou[positives].argsort(descending=True)[:_ANCHORS]].flip(0)
    boxes = to_original(learned.anchors[shown], learned.batch, 0)
    of_objects = matches.index[positives].bincount(minlength=len(target["boxes"])).tolist()
    outlines = [
        Outline(box, LegendEntry("", palette_color(owner), bool(best), thin=True))
        for box, owner, best in zip(boxes.tolist(), matches.index[shown].tolist(), rescued[shown].tolist(), strict=True)
    ]
    for number, (outline, count) in enumerate(zip(outlines_of_objects(target, class_names), of_objects, strict=True)):
        look = outline.look._replace(color=palette_color(number))
        outlines.append(Outline(outline.box, look, f"{outline.caption}: {count}"))
    few = int(rescued.sum())
    best = f", best {len(shown)} shown" if len(shown) < len(positives) else ""
    which = f"anchor with {measure} >= {positive_from:g}" if positive_from else "positive anchor"
    legend = [
        LegendEntry("object: number of its anchors", GROUND_TRUTH_COLOR),
        DIFFICULT,
        LegendEntry(f"{which}: {len(positives) - few}", GROUND_TRUTH_COLOR, thin=True),
    ]
    if positive_from:
        legend.append(LegendEntry(f"only best of its object: {few}", GROUND_TRUTH_COLOR, dashed=True, thin=True))
    return sketch(image, outlines, legend, f"{len(positives)} positive anchors of {len(matches.kind)}{best}")


def draw_proposals(image: Tensor, target: Mapping[str, Any], record: StepRecord, index: int) -> Tensor:
    """Return a picture (3, H', W') of the best proposals of an image before NMS, and on top of them after NMS."""
    assert record.batch is not None
    found = record.proposals[index]
    before = found.scores.topk(min(_BEFORE, len(found.scores))).indices
    earlier = to_original(found.boxes[before], record.batch, index)
    later = to_original(found.boxes[found.kept[:_AFTER]], record.batch, index)
    hit = (pairwise_iou(target["boxes"].float(), later) >= 0.5).any(dim=0)
    of_before = LegendEntry(f"best {len(earlier)} of {len(found.scores)} before NMS", _GREY, thin=True)
    outlines = [Outline(box, of_before) for box in earlier.tolist()]
    objects = zip(target["boxes"].tolist(), target["difficult"].tolist(), strict=True)
    outlines += [Outline(box, DIFFICULT if difficult else OBJECT) for box, difficult in objects]
    after = [Outline(box, _HIT if on else _ELSEWHERE) for box, on in zip(later.tolist(), hit.tolist(), strict=True)]
    title = f"best {len(later)} of {len(found.kept)} proposals after NMS: {int(hit.sum())} lie on objects"
    return sketch(image, outlines + after[::-1], [_HIT, _ELSEWHERE, of_before, OBJECT, DIFFICULT], title)


def draw_rois(image: Tensor, target: Mapping[str, Any], learned: StepRecord, class_names: Sequence[str]) -> Tensor:
    """Return a picture (3, H', W') of the sampled RoIs of an image by label, and its objects."""
    assert learned.batch is not None
    (sampled,) = learned.sampled_rois
    boxes, labels = to_original(sampled.boxes, learned.batch, 0).tolist(), sampled.labels.tolist()
    looks = [LegendEntry("background", _GREY, thin=True)]
    looks += [LegendEntry(name, class_color(name), thin=True) for name in class_names]
    drawn = [Outline(box, looks[label]) for box, label in zip(boxes, labels, strict=True)]
    drawn.sort(key=lambda outline: outline.look is not looks[0])  # background is below
    numbers = [(look, labels.count(label)) for label, look in enumerate(looks) if label in labels]
    legend = [look._replace(text=f"{look.text} {number}") for look, number in numbers]
    title = f"{len(labels)} RoIs of {len(learned.roi_candidates[0])} proposals and objects"
    return sketch(image, drawn + outlines_of_objects(target, class_names), [*legend, OBJECT, DIFFICULT], title)
