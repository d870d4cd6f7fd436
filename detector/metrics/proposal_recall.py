"""Recall of the region proposals: separates a bad RPN, or bad anchors, from a bad box head."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.boxes import pairwise_iou
from detector.errors import InputError
from detector.kernels.transfers import true_indices
from detector.metrics.coco_ap import SIZES
from detector.metrics.flat_states import (
    FlatStateMetric,
    check_batch,
    check_boxes,
    check_labels,
    first_of_each_image,
    image_ids_of,
    rows_of,
)
from detector.metrics.voc_ap import FloatArray, IntArray

# float32 as the IoUs are: an IoU of exactly 0.65 reaches the threshold 0.65
IOU_THRESHOLDS: Final = np.linspace(0.5, 0.95, 10).astype(np.float32)
TOP_K: Final = (50, 100, 300, 1000, 2000)


def reachable(most: int) -> list[int]:
    """Return the numbers k of `TOP_K` up to the most proposals that an image has, and, if there are more, that number.

    Recall at a larger k would be the same number under another name.
    """
    return sorted({min(k, max(most, 1)) for k in TOP_K})


class ProposalRecall(FlatStateMetric):
    """Share of the objects that are not difficult which the best k proposals of their image cover.

    An object is covered if any of the first k proposals overlaps it by the IoU threshold; one proposal may cover
    several objects. Source: Ren et al., "Faster R-CNN" (PAMI 2017), section 4.1, "Analysis of Recall-to-IoU". Matching
    one to one, as COCO's AR and detectron2's evaluation of proposals do, can only be lower.

    `compute` returns 0-d float32 tensors, nan where there are no objects:

    - `proposal_recall@<k>`: recall at IoU 0.5;
    - `proposal_AR@<k>`: mean of the recalls at IoU .50:.05:.95;
    - `proposal_AR@<detail_k>_small`, `_medium`, `_large`: the same for objects of COCO's sizes (area of the box in
      original pixels up to 32^2, up to 96^2, above; an object on a border belongs to both sides, as in COCO).

    Where an image has fewer than k proposals, those it has are used. An image that is given several times counts once.

    Attributes:
        detail_k: The number of proposals for sizes and classes: 300, or the largest of `top_k` if 300 is not among
            them.

    Raises:
        InputError: `top_k` is empty or holds a number below 1.
    """

    def __init__(self, class_names: Sequence[str], top_k: Sequence[int] = TOP_K) -> None:
        super().__init__(class_names, ("image_id", "object_count", "object_label"), ("object_area", "best_iou"))
        if not top_k or min(top_k) < 1:
            raise InputError(f"top_k is {list(top_k)}; give at least one number of proposals, each at least 1")
        self.top_k = tuple(sorted(set(top_k)))
        self.detail_k = 300 if 300 in self.top_k else self.top_k[-1]

    def update(self, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Add a batch.

        Args:
            proposals: Per image (P, 4) xyxy in pixels of the original image, by descending objectness.
            targets: Per image `boxes` (G, 4), `labels` (G,), `difficult` (G,) bool, `image_id` 0-d.

        Raises:
            InputError: Unequal lengths, a value that is not finite, a box of negative size, a label outside 1..C.
        """
        check_batch("proposals", proposals, targets)
        if not targets:
            return
        image_ids = image_ids_of(targets)
        counted = true_indices([~target["difficult"].bool() for target in targets])
        boxes = [target["boxes"][own].float() for target, own in zip(targets, counted, strict=True)]
        labels = torch.cat([target["labels"][own] for target, own in zip(targets, counted, strict=True)])
        counts = [len(box) for box in boxes]
        all_boxes = torch.cat(boxes)
        check_boxes("object", all_boxes, counts, image_ids)
        check_labels("object", labels, counts, image_ids, len(self.class_names))
        check_boxes("proposal", torch.cat(proposals), [len(box) for box in proposals], image_ids)
        best = [self._best_iou(box, proposal.float()) for box, proposal in zip(boxes, proposals, strict=True)]
        self.append(
            image_id=image_ids,
            object_count=torch.tensor(counts),
            object_label=labels,
            object_area=(all_boxes[:, 2:] - all_boxes[:, :2]).prod(dim=1),
            best_iou=torch.cat(best),
        )

    def compute(self) -> dict[str, Tensor]:
        """Return all numbers over everything seen so far, on all processes; see the class."""
        chosen = first_of_each_image(self.array("image_id"))
        rows = rows_of(chosen, self.array("object_count"))
        label = self.array("object_label")
        rows = rows[np.isin(label[rows], [i for i, name in enumerate(self.class_names, start=1) if name in self.only])]
        best_iou = self.array("best_iou").reshape(-1, len(self.top_k))[rows]
        area = self.array("object_area")[rows]
        self._evaluated = (best_iou, label[rows], area)
        values: dict[str, float] = {}
        for column, k in enumerate(self.top_k):
            recalls = _recalls(best_iou[:, column])
            values[f"proposal_recall@{k}"] = float(recalls[0])
            values[f"proposal_AR@{k}"] = float(recalls.mean())
        for size, recalls in self.recall_by_size().items():
            if size != "all":
                values[f"proposal_AR@{self.detail_k}_{size}"] = float(recalls.mean())
        return self.tensors(values)

    def recall_by_size(self, k: int | None = None) -> dict[str, NDArray[np.float64]]:
        """Return the recalls (10,) in the last `compute` at IoU .50:.05:.95, of `all` objects and of COCO's sizes.

        They are of `k` proposals, one of `top_k`; by default `detail_k`.
        """
        best_iou, _, area = self._results(k)
        of_size = {size: (area >= low) & (area <= high) for size, (low, high) in SIZES.items()}
        return {"all": _recalls(best_iou)} | {size: _recalls(best_iou[rows]) for size, rows in of_size.items()}

    def recall_per_class(self, k: int | None = None) -> dict[str, float]:
        """Return the recall of `k` proposals at IoU 0.5 of each class, nan for a class without objects."""
        best_iou, label, _ = self._results(k)
        classes = [(i, name) for i, name in enumerate(self.class_names, start=1) if name in self.only]
        return {name: float(_recalls(best_iou[label == i])[0]) for i, name in classes}

    def _best_iou(self, boxes: Tensor, proposals: Tensor) -> Tensor:
        """Return the IoU (G, K) of each object's best proposal of the first k, for each of `top_k`; 0 without any."""
        if len(boxes) == 0 or len(proposals) == 0:
            return boxes.new_zeros(len(boxes), len(self.top_k))
        iou = pairwise_iou(boxes, proposals[: self.top_k[-1]]).nan_to_num(0.0)
        return torch.stack([iou[:, :k].amax(dim=1) for k in self.top_k], dim=1)

    def _results(self, k: int | None) -> tuple[NDArray[np.float32], IntArray, FloatArray]:
        k = self.detail_k if k is None else k
        if k not in self.top_k:
            raise InputError(f"recall with {k} proposals was not asked for; top_k is {list(self.top_k)}")
        best_iou, label, area = self.last_evaluated()
        return best_iou[:, self.top_k.index(k)], label, area


def _recalls(best_iou: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the share (10,) of the objects (G,) whose best IoU reaches each threshold; nan without objects."""
    if len(best_iou) == 0:
        return np.full(len(IOU_THRESHOLDS), np.nan)
    covered: NDArray[np.float64] = (best_iou[:, None] >= IOU_THRESHOLDS).mean(axis=0)
    return covered
