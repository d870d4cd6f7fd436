"""Detections: what a trained detector finds in an image, with names, as a picture, and in the formats of others."""

import xml.etree.ElementTree as ElementTree  # only builds
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detector.errors import InputError, listed
from detector.metrics.class_subset import chosen_classes
from detector.metrics.coco_results import coco_results
from detector.use.drawing import LARGEST_SIDE, draw_detections
from detector.use.pixels import Picture, pixels_of
from detector.use.reading import USUAL, Reading


class Detection(NamedTuple):
    """One detection: its box (x1, y1, x2, y2) in pixels, its score in 0..1, its label in 1..C, and the class's name."""

    box: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of an image, the best first.

    Indexed by a whole number they give a `Detection`, by a slice, a mask or a list of numbers `Detections`.

    >>> import detector
    >>> found = detector.load("experiments/weights/mini_voc.ckpt")("photo.jpg")
    >>> len(found.above(0.5)), found.above(0.5).names
    (4, ['triangle', 'rectangle', 'ellipse', 'star'])
    >>> best = found[0]
    >>> best.name, round(best.score, 2), found.class_names[best.label]
    ('triangle', 1.0, 'triangle')
    >>> found.above(0.5).draw().size
    (405, 498)

    Args:
        boxes: (D, 4) xyxy in continuous pixels of the upright image.
        scores: (D,), descending.
        labels: (D,), in 1..C: 0 is background, which is never detected.
        class_names: Name of each label: `class_names[label]`.
        size: (height, width) of the image.
        image: The image, or its path, for `draw`.
        file_name: For the formats of others; empty for an image that is no file.
        reading: How the image is read.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: Mapping[int, str]
    size: tuple[int, int]
    image: Picture
    file_name: str = ""
    reading: Reading = USUAL

    @property
    def names(self) -> list[str]:
        """Return the name of the class of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: "slice | Tensor | Sequence[int] | np.ndarray") -> "Detections": ...
    def __getitem__(self, index: Any) -> "Detection | Detections":
        if isinstance(index, int | np.integer):
            label = int(self.labels[index])
            x1, y1, x2, y2 = self.boxes[index].tolist()
            return Detection((x1, y1, x2, y2), float(self.scores[index]), label, self.class_names[label])
        chosen = index if isinstance(index, slice) else torch.as_tensor(index, device=self.scores.device)
        if isinstance(chosen, Tensor) and not len(chosen):
            chosen = chosen.long()
        return replace(self, boxes=self.boxes[chosen], scores=self.scores[chosen], labels=self.labels[chosen])

    def __repr__(self) -> str:
        shown = listed([f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)])
        return f"Detections({len(self)}{f': {shown}' if shown else ''})"

    def above(self, score: float) -> "Detections":
        """Return the detections with at least this score."""
        return self[self.scores >= score]

    def of(self, *names: str) -> "Detections":
        """Return the detections of these classes.

        Raises:
            InputError: There is no such class.
        """
        chosen = chosen_classes(names, list(self.class_names.values()))
        wanted = [label for label, name in self.class_names.items() if name in chosen]
        return self[torch.isin(self.labels, torch.tensor(wanted, device=self.labels.device))]

    def draw(self, min_side: int = 400, max_side: int = LARGEST_SIDE) -> Image.Image:
        """Return the image with all boxes, names and scores.

        Args:
            min_side: Enlarge the image until its shorter side has that many pixels, so that captions can be read.
            max_side: Make it smaller where its longer side has more pixels.
        """
        return Image.fromarray(self.drawn(0.0, min_side, max_side).permute(1, 2, 0).numpy())

    def drawn(self, score_threshold: float, min_side: int = 400, max_side: int = LARGEST_SIDE) -> Tensor:
        """Return the picture (3, H, W) of the detections from a score on; see `draw`."""
        pixels = pixels_of(self.image, self.reading)
        found = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        names = list(self.class_names.values())
        return draw_detections(pixels, found, names, score_threshold, min_side=min_side, max_side=max_side)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return COCO results: `image_id`, `file_name`, `category_id`, `category_name`, `bbox` (xywh) and `score`."""
        arrays = {"score": self.scores.float().cpu().numpy(), "box": self.boxes.float().cpu().numpy()}
        arrays |= {"label": self.labels.cpu().numpy(), "image_id": np.zeros(len(self), dtype=np.int64)}
        return coco_results(arrays, [self.file_name], list(self.class_names.values()), image_ids=[image_id])

    def to_voc(self) -> str:
        """Return an annotation in VOC's XML, for labelling tools: whole pixels, counted from 1, last ones included."""
        root = ElementTree.Element("annotation")
        _add(root, filename=Path(self.file_name).name or "image.jpg")
        _add(ElementTree.SubElement(root, "size"), width=self.size[1], height=self.size[0], depth=3)
        _add(root, segmented=0)
        for found in self:
            node = ElementTree.SubElement(root, "object")
            _add(node, name=found.name, pose="Unspecified", truncated=0, difficult=0)
            x1, y1 = (min(round(value), side - 1) for value, side in zip(found.box, self.size[::-1], strict=False))
            x2, y2 = (round(value) for value in found.box[2:])
            corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": max(x2, x1 + 1), "ymax": max(y2, y1 + 1)}
            _add(ElementTree.SubElement(node, "bndbox"), **corners)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode") + "\n"

    def to_yolo(self) -> str:
        """Return a label file of YOLO's: a line for each box, class from 0, centre and sides as shares of the image."""
        height, width = self.size
        lines = [
            f"{label - 1} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n"
            for (x1, y1, x2, y2), _, label, _ in self
        ]
        return "".join(lines)

    def to_supervision(self) -> Any:
        """Return the `Detections` of the package supervision; its class ids count from 0, and names come along.

        Raises:
            InputError: The package is not installed.
        """
        try:
            from supervision import Detections as Theirs
        except ImportError as error:
            raise InputError("to_supervision: needs the package supervision; pip install supervision") from error
        return Theirs(
            xyxy=self.boxes.float().cpu().numpy(),
            confidence=self.scores.float().cpu().numpy(),
            class_id=self.labels.cpu().numpy() - 1,
            data={"class_name": np.array(self.names, dtype=str)},
        )


def _add(node: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(node, tag).text = str(text)
