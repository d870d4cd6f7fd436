"""What an average precision hides: confusion of classes, precision and recall, scores and how far they can be trusted.

All of it rests on VOC's matching at IoU 0.5 (`voc_ap.py`): difficult objects are neither to be found nor wrong to find.
`C` classes, `D` detections, `G` objects, `T` score thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError
from detector.metrics.detection_ap import EvaluatedSplit
from detector.metrics.error_breakdown import KINDS, ErrorBreakdown, break_down_errors
from detector.metrics.proposal_recall import IOU_THRESHOLDS, ProposalRecall
from detector.metrics.voc_ap import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE, BoolArray, ClassAP, FlagArray, IntArray

SCORE_THRESHOLDS: Final = np.linspace(0, 1, 101).astype(np.float32)
"""Of curves; float32 as scores are. TensorBoard cannot show more than 127."""
SCORE_BINS: Final = 20
BACKGROUND: Final = "background"
MISSED: Final = "missed"


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """Which classes are taken for which.

    A true positive counts in the cell of its class. A classification error of `error_breakdown.py` stands in the row of
    the object that it covers, also where that is difficult or has been found by another detection; all other false
    positives stand in the last row, background. An object that is not difficult, and that neither a true positive nor
    a classification error covers, stands in the last column, missed. So the column of a class adds up to its detections
    without ignored ones, while an object that several detections cover counts several times in its row.

    Attributes:
        counts: (C + 1, C + 1) by true class and then detected class.
        row, column: (D,) the cell of each detection; -1 for ignored ones and those below the score threshold.
        target: (D,) the object that it covers, or is a duplicate of, or lies badly on; -1 for none.
        missed: (G,) whether each object is in the last column.
    """

    counts: IntArray
    row: IntArray
    column: IntArray
    target: IntArray
    missed: BoolArray


def confusion_matrix(split: EvaluatedSplit, classes: int, score_threshold: float = 0.5) -> ConfusionMatrix:
    """Return the confusion of classes 1..C, of detections with a score of at least `score_threshold`.

    Raises:
        InputError: The threshold is not in 0..1.
    """
    if not 0 <= score_threshold <= 1:
        raise InputError(f"score_threshold is {score_threshold}; it must be in 0..1")
    kept = np.flatnonzero(split.detections.score >= score_threshold)
    detections, objects = split.detections.take(kept), split.ground_truth
    errors = break_down_errors(detections, objects, range(1, classes + 1))
    is_true = errors.matched.flags == TRUE_POSITIVE
    covers = is_true | (errors.kind == KINDS.index("classification"))
    row = np.where(errors.kind >= 0, classes, -1)
    row[covers] = objects.label[errors.target[covers]] - 1
    column = np.where(row >= 0, detections.label - 1, -1)
    missed = ~objects.difficult & (objects.label >= 1) & (objects.label <= classes)
    missed[errors.target[covers]] = False
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(counts, (row[row >= 0], column[row >= 0]), 1)
    counts[:-1, -1] = np.bincount(objects.label[missed] - 1, minlength=classes)
    of_all = np.full((3, len(split.detections)), -1, np.int64)
    of_all[:, kept] = row, column, errors.target
    return ConfusionMatrix(counts, of_all[0], of_all[1], of_all[2], missed)


def precision_recall(one: ClassAP) -> dict[str, Any]:
    """Return the detections (T,) with at least each of `SCORE_THRESHOLDS`, and what they are worth.

    Returns:
        `ap` as area under the whole curve, `objects` to be found, `true_positives`, `false_positives`, `precision` (nan
        without detections) and `recall` (nan without objects).
    """
    number = np.searchsorted(-one.scores.astype(np.float32), -SCORE_THRESHOLDS, side="right")
    is_true = one.flags[one.flags != IGNORED] == TRUE_POSITIVE
    true = np.concatenate(([0], np.cumsum(is_true)))[number]
    return {
        "ap": one.ap_area,
        "objects": one.npos,
        "true_positives": true,
        "false_positives": number - true,
        "precision": np.divide(true, number, out=np.full(len(number), np.nan), where=number > 0),
        "recall": true / one.npos if one.npos else np.full(len(number), np.nan),
    }


def score_statistics(scores: NDArray[np.floating], flags: FlagArray) -> dict[str, Any]:
    """Return histograms of the scores (D,) of true and false positives, and the reliability diagram.

    Bins are of equal width over 0..1, `SCORE_BINS` of them; ignored detections are left out. A detector whose scores
    are probabilities has in each bin a `precision` equal to its `mean_score`. `calibration_error` is their mean
    distance, weighted by detections. Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017); on
    detections: Kueppers et al., "Multivariate Confidence Calibration for Object Detection" (CVPR Workshops 2020).
    """
    within = np.clip((scores * SCORE_BINS).astype(np.int64), 0, SCORE_BINS - 1)
    true, false = (np.bincount(within[flags == flag], minlength=SCORE_BINS) for flag in (TRUE_POSITIVE, FALSE_POSITIVE))
    counted, number = flags != IGNORED, true + false
    totals = np.bincount(within[counted], scores[counted], SCORE_BINS)
    precision, mean_score = (
        np.divide(sums, number, out=np.full(SCORE_BINS, np.nan), where=number > 0) for sums in (true, totals)
    )
    error = float(np.abs(true - totals).sum() / number.sum()) if counted.any() else float("nan")
    return {
        "true": true,
        "false": false,
        "mean_score": mean_score,
        "precision": precision,
        "calibration_error": error,
    }


def curves_of(
    split: EvaluatedSplit,
    class_names: Sequence[str],
    proposals: ProposalRecall | None = None,
    score_threshold: float = 0.5,
) -> dict[str, Any]:
    """Return everything of this module as lists and numbers, nan where undefined.

    Args:
        split: As `DetectionAP.of_chosen_classes` returns it: of all processes, each image once.
        class_names: Of the labels 1..C.
        proposals: Computed already: adds `proposal_recall` of its numbers of proposals over IoU.
        score_threshold: Of the confusion matrix; all else counts every detection.

    Returns:
        `class_names`, `score_threshold`, `confusion` (see `ConfusionMatrix.counts`), `score_thresholds`,
        `precision_recall` by class, `scores`, `errors` with the `gain` in mean AP and `count` of each kind of error,
        and `proposal_recall` with `iou` and `recall` by number of proposals.
    """
    errors: ErrorBreakdown = break_down_errors(split.detections, split.ground_truth, range(1, len(class_names) + 1))
    per_class = {name: precision_recall(one) for name, one in zip(class_names, errors.matched.per_class, strict=True)}
    recalls = (
        {}
        if proposals is None
        else {
            "proposal_recall": {
                "iou": [round(float(iou), 2) for iou in IOU_THRESHOLDS],
                "recall": {str(k): proposals.recall_by_size(k)["all"].tolist() for k in proposals.top_k},
            }
        }
    )
    return {
        "class_names": list(class_names),
        "score_threshold": score_threshold,
        "confusion": confusion_matrix(split, len(class_names), score_threshold).counts.tolist(),
        "score_thresholds": [round(float(threshold), 2) for threshold in SCORE_THRESHOLDS],
        "precision_recall": {name: _as_lists(values) for name, values in per_class.items()},
        "scores": _as_lists(score_statistics(split.detections.score, errors.matched.flags)),
        "errors": {
            "gain": errors.mean_gain(),
            "count": {kind: int(errors.count[kind].sum()) for kind in KINDS},
        },
        **recalls,
    }


def _as_lists(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
