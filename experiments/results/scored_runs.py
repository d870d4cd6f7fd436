"""The detections of runs scored again, for differences between runs on the same images.

A run's predictions.json holds the detections of its last validation or test; the annotations are those of the data that
its config.yaml names.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.detection_datamodule import DetectionDataModule
from datamodules.ground_truth import SplitTruth
from detector.errors import InputError
from detector.metrics.bootstrap import Samples
from detector.metrics.detection_ap import EvaluatedSplit, average_precisions_by_name
from experiments.options import DATA_FORMATS
from experiments.results.evaluate import evaluated_split, paired_differences, resample
from experiments.results.files import read_results
from experiments.results.runs import Run

TOLERANCE = 1e-3
"""By how much AP may differ from metrics.json: predictions.json holds rounded scores and boxes."""


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """The detections of a run.

    Attributes:
        truth: The images and their objects.
        split: Detections beside objects.
        values: Average precisions by name, without the prefix of a split.
        samples: (R,) the same in R resamples of the images; empty without resampling.
    """

    truth: SplitTruth
    split: EvaluatedSplit
    values: Mapping[str, float]
    samples: Mapping[str, Samples]


class Scorer:
    """Scores runs on one part of their data, and reads the annotations of equal data once.

    Args:
        part: val or test: which of the data's splits the predictions are of.
        resamples: Resamples of the images; 0 for none.
        seed: Of the resampling.
        coco: COCO's numbers too; they take most of the time.
    """

    def __init__(self, part: str, resamples: int, seed: int = 0, coco: bool = False) -> None:
        self.part = part
        self.resamples = resamples
        self.seed = seed
        self.coco = coco
        self._truths: dict[str, SplitTruth] = {}

    def score(self, run: Run) -> ScoredRun:
        """Score a run.

        Raises:
            InputError: No config.yaml or predictions.json, no annotations, or predictions that are not those of the
                reported numbers.
        """
        truth = self.truth(run)
        path = run.folder / "predictions.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; frcnn validate and frcnn test write it")
        split = evaluated_split(truth, read_results(path, truth))
        values = average_precisions_by_name(split, truth.class_names, self.coco)
        reported = (run.metrics or {}).get(f"{self.part}/AP50_voc07")
        if reported is not None and abs(values["AP50_voc07"] - reported) > TOLERANCE:
            raise InputError(
                f"{path}: gives {self.part}/AP50_voc07 {values['AP50_voc07']:.4f}, metrics.json says {reported:.4f}: "
                "not the detections of that evaluation, or the annotations have changed"
            )
        samples = resample(truth, split, self.resamples, self.seed, self.coco) if self.resamples else {}
        return ScoredRun(truth, split, values, samples)

    def truth(self, run: Run) -> SplitTruth:
        """The annotations of a run's data.

        Raises:
            InputError: There is no config.yaml, or anything is wrong with the dataset.
        """
        if run.config is None or "data" not in run.config:
            raise InputError(f"{run.folder / 'config.yaml'}: is missing or damaged, so its data are not known")
        options = data_options(run)
        key = json.dumps([run.config.get("data_format"), options], sort_keys=True, default=str)
        if options.get("val_fraction") is not None:
            key += str(run.folder)  # each run keeps its own lists of made splits
        if key not in self._truths:
            self._truths[key] = data_module(run).ground_truth(self.part)
        return self._truths[key]


def average(runs: Sequence[ScoredRun]) -> ScoredRun:
    """The mean over seeds: of the values, and resample by resample of the samples."""
    first = runs[0]
    values = {name: float(np.mean([run.values[name] for run in runs])) for name in first.values}
    samples = {name: np.mean([run.samples[name] for run in runs], axis=0) for name in first.samples}
    return replace(first, values=values, samples=samples)


def difference(ours: ScoredRun, theirs: ScoredRun) -> dict[str, dict[str, Any]]:
    """By metric name: `difference`, `low`, `high`, `share_better`, and whether the interval `excludes_zero`.

    Raises:
        InputError: They are not of the same images and classes.
    """
    if (ours.truth.image_names, ours.truth.class_names) != (theirs.truth.image_names, theirs.truth.class_names):
        raise InputError(
            f"evaluated on other images or classes ({', '.join(ours.truth.splits)} and "
            f"{', '.join(theirs.truth.splits)}), so there is no paired difference"
        )
    found: dict[str, dict[str, Any]] = {}
    for name, one in paired_differences(ours.values, theirs.values, ours.samples, theirs.samples).items():
        known = not (math.isnan(one["low"]) or math.isnan(one["high"]))
        found[name] = {**one, "excludes_zero": (one["low"] > 0 or one["high"] < 0) if known else None}
    return found


def data_format(run: Run) -> str:
    """voc or coco."""
    return str((run.config or {}).get("data_format") or "voc")


def data_options(run: Run) -> dict[str, Any]:
    """The `--data` options of a run. A relative root that is not here is looked for from the folders above the run."""
    data = dict((run.config or {})["data"])
    options = dict(data.get("init_args", data))
    root = Path(str(options.get("root"))).expanduser()
    if not root.is_absolute() and not root.is_dir():
        above = (folder / root for folder in run.folder.resolve().parents)
        root = next((path for path in above if path.is_dir()), root)
    return options | {"root": str(root)}


def data_module(run: Run) -> DetectionDataModule:
    """The data of a run, with its own lists of made splits.

    Raises:
        InputError: Anything wrong with the options or the dataset.
    """
    kind = DATA_FORMATS.get(data_format(run))
    if kind is None:
        raise InputError(f"{run.folder / 'config.yaml'}: data_format {data_format(run)}: there is no such format")
    try:
        data = kind(**data_options(run))
    except TypeError as error:
        raise InputError(f"{run.folder / 'config.yaml'}: data: {error}") from error
    if (run.folder / "splits").is_dir():
        data.splits_folder = run.folder / "splits"
    return data
