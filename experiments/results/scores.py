"""Detections beside the objects of a split, scored: average precisions, the same in resamples, and differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datamodules.ground_truth import SplitTruth
from detector.errors import InputError
from detector.metrics.bootstrap import Samples, bootstrap, interval, share_above_zero
from detector.metrics.coco_matching import AREAS, match_coco
from detector.metrics.detection_ap import EvaluatedSplit, average_precisions_by_name
from detector.metrics.voc_ap import TRUE_POSITIVE, Detections

CLASS_PREFIX = "AP50_voc_class/"


@dataclass(frozen=True, eq=False)
class Scored:
    """Hold the detections of a run, or of a file, with their scores.

    Attributes:
        truth: The images and their objects.
        detections: In these images.
        values: Average precisions by name, without the prefix of a split.
        samples: (R,) the same in R resamples of the images; empty without resampling.
    """

    truth: SplitTruth
    detections: Detections
    values: Mapping[str, float]
    samples: Mapping[str, Samples]

    @property
    def split(self) -> EvaluatedSplit:
        """Return the same as metrics take it."""
        return EvaluatedSplit(self.truth.image_ids, self.detections, self.truth.objects)


def score(truth: SplitTruth, detections: Detections, resamples: int = 0, seed: int = 0, coco: bool = True) -> Scored:
    """Score detections.

    Args:
        truth: The images and their objects.
        detections: In these images.
        resamples: Resamples of the images; those of two detectors on the same split are paired.
        seed: Of the resampling.
        coco: COCO's numbers too; they take most of the time.
    """
    split = EvaluatedSplit(truth.image_ids, detections, truth.objects)
    values = average_precisions_by_name(split, truth.class_names, coco)
    samples: Mapping[str, Samples] = {}
    if resamples:
        samples = bootstrap(detections, truth.objects, truth.image_ids, truth.class_names, resamples, seed, coco)
    return Scored(truth, detections, values, samples)


def average(runs: Sequence[Scored]) -> Scored:
    """Return the mean over seeds: of the values, and resample by resample of the samples."""
    first = runs[0]
    values = {name: float(np.mean([run.values[name] for run in runs])) for name in first.values}
    samples = {name: np.mean([run.samples[name] for run in runs], axis=0) for name in first.samples}
    return replace(first, values=values, samples=samples)


def recall_by_size(run: Scored) -> dict[str, Samples]:
    """Return the share of objects that the detections find, whatever their scores, by COCO's matching.

    Returns:
        Of `all`, `small`, `medium` and `large` objects, each (10,) at IoU .50:.05:.95; nan without objects.
    """
    labels = range(1, len(run.truth.class_names) + 1)
    matches = list(match_coco(run.detections, run.truth.objects, run.truth.image_ids, labels))
    found = np.sum([(one.flags == TRUE_POSITIVE).sum(axis=2) for one in matches], axis=0)
    objects = np.sum([one.objects.sum(axis=1) for one in matches], axis=0)[:, None]
    recalls = np.divide(found, objects, out=np.full(found.shape, np.nan), where=objects > 0)
    return {(size or "_all")[1:]: row for size, row in zip(AREAS, recalls, strict=True)}


def difference(ours: Scored, theirs: Scored) -> dict[str, dict[str, Any]]:
    """Compare every metric that was resampled.

    Returns:
        By metric name: `difference` (ours - theirs), its interval from `low` to `high`, `share_better`, and whether the
        interval `excludes_zero`, None where it is not known.

    Raises:
        InputError: They are not of the same images and classes.
    """
    if (ours.truth.image_names, ours.truth.class_names) != (theirs.truth.image_names, theirs.truth.class_names):
        raise InputError(
            f"evaluated on other images or classes ({', '.join(ours.truth.splits)} and "
            f"{', '.join(theirs.truth.splits)}), so there is no paired difference"
        )
    found: dict[str, dict[str, Any]] = {}
    for name, samples in ours.samples.items():
        change = samples - theirs.samples[name]
        between = interval(change)
        found[name] = {
            "difference": ours.values[name] - theirs.values[name],
            "low": between.low,
            "high": between.high,
            "share_better": share_above_zero(change),
            "excludes_zero": None if between.low != between.low else between.low > 0 or between.high < 0,
        }
    return found
