"""What a trained detector sees in one image, stage by stage: the pictures of `frcnn serve`, and the scores of a box."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from detector.image_batch import to_original
from detector.step_record import StepRecord, ask, unrecorded
from detector.training.callbacks.inside_images import draw_anchors, draw_proposals, draw_rois
from detector.training.callbacks.validation_losses import losses_of_image
from detector.training.callbacks.validation_pictures import Outline, sketch
from detector.use.detections import Detections
from detector.use.drawing import GROUND_TRUTH_COLOR, LegendEntry, draw_detections, palette_color
from detector.use.loading import TrainedDetector
from detector.use.pixels import Picture, pixels_of

View = Literal["detections", "stages", "proposals", "anchors", "rois"]
VIEWS: Final[dict[str, View]] = {
    "Detections": "detections",
    "Each one's anchor, proposal and box": "stages",
    "Proposals": "proposals",
    "Anchors positive for the detections": "anchors",
    "RoIs, were they the objects": "rois",
}
"""Caption of each view. In the last two the detections that are shown are taken for the objects of a training."""
SHORTEST: Final = 400  # pixels of a picture of detections: captions can be read
_ANCHOR: Final = LegendEntry("anchor", GROUND_TRUTH_COLOR, dashed=True, thin=True)
_PROPOSAL: Final = LegendEntry("proposal", GROUND_TRUTH_COLOR, thin=True)
_BOX: Final = LegendEntry("box", GROUND_TRUTH_COLOR)


@dataclass(frozen=True, eq=False)
class Scores:
    """The class scores of one box, background included, and what box it is.

    Args:
        scores: Probability by name; they add up to 1.
        about: The box in words.
    """

    scores: dict[str, float]
    about: str


@dataclass(frozen=True, eq=False)
class Look:
    """One pass of a detector over one image, to be looked at in many ways.

    Args:
        trained: The detector.
        pixels: (3, H, W) uint8, upright.
        found: All detections.
        record: What happened inside.
    """

    trained: TrainedDetector
    pixels: Tensor
    found: Detections
    record: StepRecord

    def shown(self, score_threshold: float, classes: Sequence[str]) -> Tensor:
        """Return the indices (S,) of the detections with at least a score, of some classes; none named: of all."""
        names = [not classes or name in classes for name in self.found.names]
        return ((self.found.scores >= score_threshold) & torch.tensor(names, dtype=torch.bool)).nonzero().flatten()

    def picture(self, view: View, score_threshold: float, classes: Sequence[str]) -> Tensor:
        """Return a picture (3, H', W') of a view, with the detections from a score on, of some classes."""
        index = self.shown(score_threshold, classes)
        chosen, names = self.found[index], list(self.found.class_names.values())
        if view == "detections":
            columns = {"boxes": chosen.boxes, "scores": chosen.scores, "labels": chosen.labels}
            return draw_detections(self.pixels, columns, names, 0.0, min_side=SHORTEST)
        if view == "stages":
            return self._stages(index)
        columns = {
            "boxes": chosen.boxes,
            "labels": chosen.labels,
            "difficult": torch.zeros(len(chosen), dtype=torch.bool),
        }
        target = {"image_id": torch.tensor(0)} | {key: value.to(self.trained.device) for key, value in columns.items()}
        if view == "proposals":
            return draw_proposals(self.pixels, target, self.record, 0)
        model = self.trained.module.model
        with torch.inference_mode(), unrecorded(), closing(ask()) as learned:
            losses_of_image(model, self.record, 0, target)
        if view == "anchors":
            rule = model.rpn.matcher.positive_from, model.rpn.matcher.measure
            return draw_anchors(self.pixels, target, learned, names, *rule)
        return draw_rois(self.pixels, target, learned, names)

    def _stages(self, index: Tensor) -> Tensor:
        """Return a picture of where the detections of some indices come from, the best on top."""
        rois = self._rois(index)
        proposals = self.record.proposals[0]
        places = proposals.kept[rois]
        anchors, boxes = self._original(self.record.anchors[proposals.anchors[places]]), proposals.boxes[places]
        rows = zip(anchors, self._original(boxes), self.found.boxes[index].tolist(), self.found[index], strict=True)
        outlines: list[Outline] = []
        for number, (anchor, proposal, box, one) in reversed(list(enumerate(rows))):
            looks = [look._replace(color=palette_color(number)) for look in (_ANCHOR, _PROPOSAL, _BOX)]
            captions = "", "", f"{one.name} {one.score:.2f}"
            outlines += map(Outline, (anchor, proposal, box), looks, captions)
        return sketch(self.pixels, outlines, [_ANCHOR, _PROPOSAL, _BOX], f"{len(index)} detections, a colour for each")

    def scores_at(self, x: float, y: float, score_threshold: float, classes: Sequence[str]) -> Scores | None:
        """Return the scores of the smallest box around a point of the image: a detection that is shown, or a proposal.

        None where there is neither.
        """
        index = self.shown(score_threshold, classes)
        if (place := _smallest(self.found.boxes[index], x, y)) is not None:
            one = self.found[int(index[place])]
            return self._scores(
                self._rois(index[place : place + 1]), f"the detection {one.name} {one.score:.3f}", one.box
            )
        boxes = to_original(self.record.rois[0], self._batch, 0).cpu()
        if (place := _smallest(boxes, x, y)) is None:
            return None
        return self._scores(torch.tensor([place]), f"proposal {place + 1} of {len(boxes)}", boxes[place].tolist())

    def _scores(self, roi: Tensor, about: str, box: Sequence[float]) -> Scores:
        (values,) = self.record.roi_logits[roi.to(self.record.roi_logits.device)].softmax(-1).tolist()
        names = ["background", *self.found.class_names.values()]
        corners = ", ".join(f"{value:.1f}" for value in box)
        return Scores(dict(zip(names, values, strict=True)), f"{about}, at {corners}")

    def _rois(self, index: Tensor) -> Tensor:
        return self.record.detections[0].rois[index.to(self.record.detections[0].rois.device)]

    def _original(self, boxes: Tensor) -> Any:
        return to_original(boxes, self._batch, 0).tolist()

    @property
    def _batch(self) -> Any:
        assert self.record.batch is not None
        return self.record.batch


def look(trained: TrainedDetector, image: Picture) -> Look:
    """Detect in an image, and keep what happened inside.

    Raises:
        InputError: The image cannot be read.
    """
    pixels = pixels_of(image, trained.reading)
    with closing(ask()) as record:
        (found,) = trained.detect([pixels])
    return Look(trained, pixels, trained.detections(found, pixels, pixels), record)


def _smallest(boxes: Tensor, x: float, y: float) -> int | None:
    """Return the index of the smallest of the boxes (K, 4) around a point."""
    around = ((boxes[:, :2] <= torch.tensor([x, y])) & (boxes[:, 2:] >= torch.tensor([x, y]))).all(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).where(around, torch.inf)
    return int(areas.argmin()) if bool(around.any()) else None
