"""Average precision of detections: VOC 11-point, VOC area and COCO, from one pass over the split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import InputError
from detector.metrics.class_subset import of_classes
from detector.metrics.coco_ap import evaluate_coco
from detector.metrics.flat_states import (
    FlatStateMetric,
    check_batch,
    check_boxes,
    check_labels,
    first_of_each_image,
    image_ids_of,
    rows_of,
)
from detector.metrics.voc_ap import Detections, GroundTruth, IntArray, evaluate_voc


@dataclass(frozen=True, eq=False)
class EvaluatedSplit:
    """A split with its detections, each image once.

    Attributes:
        image_id: (N,) the images, ascending, those without objects or detections included.
        detections: D detections, sorted by image id; within an image in the order given.
        ground_truth: G objects, sorted likewise.
    """

    image_id: IntArray
    detections: Detections
    ground_truth: GroundTruth

    def of_classes(self, class_names: Sequence[str], chosen: Sequence[str]) -> "EvaluatedSplit":
        """Return the split as if there were no classes but the chosen ones, labelled 1, 2, ... in their order."""
        detections = of_classes(self.detections, class_names, chosen)
        return EvaluatedSplit(self.image_id, detections, of_classes(self.ground_truth, class_names, chosen))


class DetectionAP(FlatStateMetric):
    """VOC and COCO average precision over a whole split, the same to the bit on any number of processes.

    `compute` returns 0-d float32 tensors, fractions in 0..1:

    - `AP50_voc07`, `AP50_voc`: mean over classes of VOC's 11-point AP and area under the curve at IoU 0.5 (see
      `evaluate_voc`);
    - `AP50_voc_class/<name>`: area under the curve of one class, nan for a class without objects, which the means
      leave out;
    - with `coco`: the numbers of `evaluate_coco`, which take most of the time.

    An image that is given several times (distributed samplers repeat some) counts once, as the lowest rank saw it
    first. Detections and objects of classes that are not in `only` are ignored by `compute`, though not by `results`.
    """

    def __init__(self, class_names: Sequence[str], coco: bool = True) -> None:
        ints = ("image_id", "detection_count", "object_count", "detection_label", "object_label", "object_difficult")
        super().__init__(class_names, ints, ("detection_score", "detection_box", "object_box"))
        self.coco = coco

    def update(self, predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        """Add a batch.

        Args:
            predictions: Per image `boxes` (D, 4) xyxy in pixels of the original image, `labels` (D,) in 1..C, `scores`
                (D,).
            targets: Per image `boxes` (G, 4), `labels` (G,), `difficult` (G,) bool, `image_id` 0-d.

        Raises:
            InputError: Unequal lengths, a value that is not finite, a box of negative size, a label outside 1..C.
        """
        check_batch("predictions", predictions, targets)
        if not targets:
            return
        image_ids = image_ids_of(targets)
        detections = _concatenate("predictions", predictions, image_ids, ("labels", "scores"))
        objects = _concatenate("targets", targets, image_ids, ("labels", "difficult"))
        counts, object_counts = [len(item["boxes"]) for item in predictions], [len(item["boxes"]) for item in targets]
        check_boxes("detection", detections["boxes"], counts, image_ids, detections["scores"])
        check_boxes("object", objects["boxes"], object_counts, image_ids)
        check_labels("detection", detections["labels"], counts, image_ids, len(self.class_names))
        check_labels("object", objects["labels"], object_counts, image_ids, len(self.class_names))
        self.append(
            image_id=image_ids,
            detection_count=torch.tensor(counts),
            object_count=torch.tensor(object_counts),
            detection_label=detections["labels"],
            detection_score=detections["scores"],
            detection_box=detections["boxes"],
            object_label=objects["labels"],
            object_difficult=objects["difficult"],
            object_box=objects["boxes"],
        )

    def compute(self) -> dict[str, Tensor]:
        """Return all numbers over everything seen so far, on all processes; see the class."""
        self._evaluated = self._collect()
        return self.tensors(average_precisions_by_name(self.of_chosen_classes(), self.only, self.coco))

    def evaluated(self) -> EvaluatedSplit:
        """Return the split that the last `compute` evaluated; see `last_evaluated`."""
        split: EvaluatedSplit = self.last_evaluated()
        return split

    def of_chosen_classes(self) -> EvaluatedSplit:
        """Return what the last `compute` is of: the classes `only`, labelled 1, 2, ... in their order."""
        split = self.evaluated()
        return split if self.only == self.class_names else split.of_classes(self.class_names, self.only)

    def results(self) -> dict[str, NDArray[np.generic]]:
        """Return the detections that the last `compute` evaluated; see `last_evaluated`.

        Returns:
            `image_id` (D,), `label` (D,), `score` (D,), `box` (D, 4) xyxy in pixels of the original image.
        """
        found = self.evaluated().detections
        return {"image_id": found.image_id, "label": found.label, "score": found.score, "box": found.box}

    def _collect(self) -> EvaluatedSplit:
        image_id = self.array("image_id")
        chosen = first_of_each_image(image_id)
        images = image_id[chosen]
        counts, object_counts = self.array("detection_count"), self.array("object_count")
        rows, object_rows = rows_of(chosen, counts), rows_of(chosen, object_counts)
        detections = Detections(
            image_id=np.repeat(images, counts[chosen]),
            label=self.array("detection_label")[rows],
            score=self.array("detection_score")[rows],
            box=self.array("detection_box").reshape(-1, 4)[rows],
        )
        ground_truth = GroundTruth(
            image_id=np.repeat(images, object_counts[chosen]),
            label=self.array("object_label")[object_rows],
            box=self.array("object_box").reshape(-1, 4)[object_rows],
            difficult=self.array("object_difficult")[object_rows].astype(np.bool_),
        )
        return EvaluatedSplit(images, detections, ground_truth)


def average_precisions_by_name(
    split: EvaluatedSplit, class_names: Sequence[str], coco: bool = True
) -> dict[str, float]:
    """Return the numbers of `DetectionAP` as Python floats, of detections that are arrays already."""
    labels = range(1, len(class_names) + 1)
    voc = evaluate_voc(split.detections, split.ground_truth, labels)
    values = {"AP50_voc07": voc.ap_voc07, "AP50_voc": voc.ap_area}
    if coco:
        values |= evaluate_coco(split.detections, split.ground_truth, split.image_id, labels)
    for name, result in zip(class_names, voc.per_class, strict=True):
        values[f"AP50_voc_class/{name}"] = result.ap_area
    return values


def _concatenate(
    what: str, items: list[dict[str, Tensor]], image_ids: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Concatenate `boxes` and the named columns of a batch after checking that they are equally long in each image."""
    for item, image in zip(items, image_ids.tolist(), strict=True):
        number = len(item["boxes"])
        wrong = [name for name in names if item[name].shape != (number,)]
        if item["boxes"].shape != (number, 4) or wrong:
            shapes = {name: tuple(item[name].shape) for name in ("boxes", *names)}
            raise InputError(f"{what} of image {image}: shapes {shapes}; boxes must be (n, 4), the others (n,)")
    return {name: torch.cat([item[name] for item in items]) for name in ("boxes", *names)}
