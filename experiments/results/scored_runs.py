"""The detections of runs scored again, for differences between runs on the same images.

A run's predictions.json holds the detections of its last validation or test; the annotations are those of the data that
its config.yaml names.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.detection_datamodule import DetectionDataModule
from datamodules.ground_truth import SplitTruth
from detector.errors import InputError, shortened
from detector.metrics.curves import curves_of
from detector.metrics.proposal_recall import IOU_THRESHOLDS
from detector.parts import say_strangers
from experiments.dataset.formats import data_module_of
from experiments.results.files import read_results
from experiments.results.runs import Run
from experiments.results.scores import Scored, score

TOLERANCE = 1e-3
"""By how much AP may differ from metrics.json: predictions.json holds rounded scores and boxes."""


@dataclass
class Scorer:
    """Score runs on one part of their data, and read the annotations of equal data once.

    Args:
        part: val or test: which of the data's splits the predictions are of.
        resamples: Resamples of the images; 0 for none.
        seed: Of the resampling.
        coco: COCO's numbers too; they take most of the time.
    """

    part: str
    resamples: int
    seed: int = 0
    coco: bool = False
    _truths: dict[str, SplitTruth] = field(default_factory=dict, init=False)

    def score(self, run: Run) -> Scored:
        """Score a run.

        Raises:
            InputError: No config.yaml or predictions.json, no annotations, or predictions that are not those of the
                reported numbers.
        """
        truth = self.truth(run)
        path = run.folder / "predictions.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; frcnn validate and frcnn test write it")
        scored = score(truth, read_results(path, truth), self.resamples, self.seed, self.coco)
        ours, reported = scored.values["AP50_voc07"], run.metric("AP50_voc07", self.part)
        if reported is not None and abs(ours - reported) > TOLERANCE:
            raise InputError(
                f"{path}: gives {self.part}/AP50_voc07 {ours:.4f}, metrics.json says {reported:.4f}: "
                "not the detections of that evaluation, or the annotations have changed"
            )
        return scored

    def truth(self, run: Run) -> SplitTruth:
        """Return the annotations of a run's data.

        Raises:
            InputError: There is no config.yaml, or anything is wrong with the dataset.
        """
        if not isinstance(run.config.get("data"), dict):
            raise InputError(f"{run.folder / 'config.yaml'}: is missing or damaged, so its data are not known")
        options = data_options(run)
        key = json.dumps([run.config.get("data_format"), options], sort_keys=True, default=str)
        if options.get("val_fraction") is not None:
            key += str(run.folder)  # each run keeps its own lists of made splits
        if key not in self._truths:
            self._truths[key] = data_module(run).ground_truth(self.part)
        return self._truths[key]


def detection_curves(run: Run, scored: Scored, part: str, score_threshold: float) -> dict[str, Any]:
    """Return what `curves_of` tells of a run's detections, and the recall of proposals that its metrics.json has."""
    made = curves_of(scored.split, scored.truth.class_names, score_threshold=score_threshold)
    table = (run.metrics.get("proposal_recall_by_size") or {}).get(part)
    if table is not None:
        made["proposal_recall"] = {"iou": IOU_THRESHOLDS.tolist(), "recall": {table["k"]: table["all"]}}
    return made


def data_options(run: Run) -> dict[str, Any]:
    """Return the `--data` options of a run.

    A relative root that is not here is looked for from the folders above the run.
    """
    data = run.config.get("data")
    if not isinstance(data, dict):
        raise InputError(f"{run.folder / 'config.yaml'}: data: {shortened(str(data))}; options are needed")
    given = data.get("init_args", data)
    options = dict(given if isinstance(given, dict) else data)
    root = Path(str(options.get("root"))).expanduser()
    if not root.is_absolute() and not root.is_dir():
        above = (folder / root for folder in run.folder.resolve().parents)
        root = next((path for path in above if path.is_dir()), root)
    return options | {"root": str(root)}


def data_module(run: Run) -> DetectionDataModule:
    """Return the data of a run, with its own lists of made splits.

    Raises:
        InputError: Anything wrong with the options or the dataset.
    """
    say_strangers(run.folder / "config.yaml", run.config)
    try:
        data: DetectionDataModule = data_module_of(run.config.get("data_format") or "voc")(**data_options(run))
    except TypeError as error:
        raise InputError(f"{run.folder / 'config.yaml'}: data: {error}") from error
    if (run.folder / "splits").is_dir():
        data.splits_folder = run.folder / "splits"
    return data
