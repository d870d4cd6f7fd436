"""`frcnn evaluate`: score the detections of any detector on annotated splits. Images are not needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.ground_truth import SplitTruth, read_ground_truth
from detector.metrics.bootstrap import Samples, bootstrap, interval, share_above_zero
from detector.metrics.class_subset import chosen_classes, of_classes
from detector.metrics.detection_ap import EvaluatedSplit, average_precisions_by_name
from detector.metrics.error_breakdown import KINDS, break_down_errors
from detector.metrics.proposal_recall import ProposalRecall
from detector.metrics.voc_ap import Detections
from experiments.dataset.formats import dataset_format
from experiments.output import json_text, number
from experiments.results.error_plot import plot_error_breakdown
from experiments.results.files import read_proposals, read_results
from experiments.results.options import EvaluateOptions

DEFAULT_RESAMPLES = 1000


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate every file of detections and print all numbers.

    JSON: one document of the metric names, `images`, `detections` and more; with several files
    `{"evaluations": [one such document each]}`.

    Raises:
        InputError: Anything wrong with the dataset, the files or the options.
    """
    data = options.data
    whole = read_ground_truth(
        dataset_format(options.data_format, data.root, data.image_dirs), data.val_splits or [], data.class_names
    )
    truth = whole if options.classes is None else _of_classes(whole, options.classes)

    def read(path: str) -> EvaluatedSplit:
        found = read_results(path, whole)
        return evaluated_split(truth, of_classes(found, whole.class_names, truth.class_names))

    splits = [(path, read(path)) for path in options.predictions]
    other = None if options.compare is None else read(options.compare)
    recall = {} if options.proposals is None else _proposal_recall(truth, read_proposals(options.proposals, truth))
    documents = [_document(options, truth, path, split, other) | recall for path, split in splits]
    if options.format == "json":
        document = documents[0] if len(documents) == 1 else {"evaluations": documents}
        print(json_text(document))
    else:
        print("\n\n".join(_table(truth, document) for document in documents))


def _of_classes(truth: SplitTruth, classes: Sequence[str]) -> SplitTruth:
    chosen = chosen_classes(classes, truth.class_names)
    return replace(truth, class_names=chosen, objects=of_classes(truth.objects, truth.class_names, chosen))


def evaluated_split(truth: SplitTruth, detections: Detections) -> EvaluatedSplit:
    """Detections beside the objects that they are scored against."""
    return EvaluatedSplit(truth.image_ids, detections, truth.objects)


def _document(
    options: EvaluateOptions, truth: SplitTruth, path: str, split: EvaluatedSplit, other: EvaluatedSplit | None
) -> dict[str, Any]:
    values = average_precisions_by_name(split, truth.class_names)
    prefix = "AP50_voc_class/"
    document: dict[str, Any] = {
        **values,
        "file": path,
        "splits": list(truth.splits),
        "images": len(truth.image_names),
        "objects": int((~truth.objects.difficult).sum()),
        "difficult": int(truth.objects.difficult.sum()),
        "detections": len(split.detections),
        **({} if options.classes is None else {"classes": list(truth.class_names)}),
        "classes_without_objects": [
            name.removeprefix(prefix) for name, value in values.items() if name.startswith(prefix) and math.isnan(value)
        ],
    }
    resamples = options.bootstrap or (DEFAULT_RESAMPLES if other is not None else 0)
    if resamples:
        samples = resample(truth, split, resamples, options.seed)
        intervals = {name: interval(values) for name, values in samples.items()}
        document["bootstrap"] = {
            "resamples": resamples,
            "seed": options.seed,
            "level": 0.95,
            "intervals": {name: [one.low, one.high] for name, one in intervals.items()},
        }
        if other is not None:
            other_values = average_precisions_by_name(other, truth.class_names)
            other_samples = resample(truth, other, resamples, options.seed)
            document["compare"] = {
                "file": options.compare,
                "values": other_values,
                "differences": paired_differences(values, other_values, samples, other_samples),
            }
    if options.breakdown or options.plot is not None:
        document["error_breakdown"] = _breakdown(options, truth, path, split)
    return document


def resample(
    truth: SplitTruth, split: EvaluatedSplit, resamples: int, seed: int, coco: bool = True
) -> dict[str, Samples]:
    """Every AP in resamples of the images, by metric name; those of two detectors on the same split are paired."""
    return bootstrap(split.detections, split.ground_truth, split.image_id, truth.class_names, resamples, seed, coco)


def paired_differences(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    samples: Mapping[str, Samples],
    others: Mapping[str, Samples],
) -> dict[str, dict[str, float]]:
    """Of every metric in `samples`: `difference` (ours - theirs), its interval from `low` to `high`, `share_better`."""
    differences = {}
    for name, values in samples.items():
        difference = values - others[name]
        between = interval(difference)
        differences[name] = {
            "difference": ours[name] - theirs[name],
            "low": between.low,
            "high": between.high,
            "share_better": share_above_zero(difference),
        }
    return differences


def _breakdown(options: EvaluateOptions, truth: SplitTruth, path: str, split: EvaluatedSplit) -> dict[str, Any]:
    errors = break_down_errors(split.detections, split.ground_truth, range(1, len(truth.class_names) + 1))
    if options.plot is not None:
        plot_error_breakdown(errors, truth.class_names, options.plot, f"{Path(path).name} on {', '.join(truth.splits)}")
    return {
        "gain": errors.mean_gain(),
        "count": {kind: int(errors.count[kind].sum()) for kind in KINDS},
        "per_class": {
            name: {kind: {"gain": errors.gain[kind][index], "count": int(errors.count[kind][index])} for kind in KINDS}
            for index, name in enumerate(truth.class_names)
        },
    }


def _proposal_recall(truth: SplitTruth, proposals: Detections) -> dict[str, float]:
    order = np.lexsort((-proposals.score, proposals.image_id))
    objects = truth.objects
    metric = ProposalRecall(truth.class_names)
    for image, rows, object_rows in zip(
        truth.image_ids.tolist(),
        _by_image(proposals.image_id[order], truth.image_ids),
        _by_image(objects.image_id, truth.image_ids),
        strict=True,
    ):
        target = {
            "boxes": torch.from_numpy(objects.box[object_rows]),
            "labels": torch.from_numpy(objects.label[object_rows]),
            "difficult": torch.from_numpy(objects.difficult[object_rows]),
            "image_id": torch.tensor(image),
        }
        metric.update([torch.from_numpy(proposals.box[order[rows]])], [target])
    values = {name: float(value) for name, value in metric.compute().items()}
    per_class = metric.recall_per_class()
    return values | {f"proposal_recall_class@{metric.detail_k}/{name}": value for name, value in per_class.items()}


def _by_image(image_id: NDArray[np.int64], image_ids: NDArray[np.int64]) -> list[slice]:
    """The rows of each image, in a sorted column of image ids."""
    first, last = (np.searchsorted(image_id, image_ids, side=side) for side in ("left", "right"))
    return [slice(start, stop) for start, stop in zip(first.tolist(), last.tolist(), strict=True)]


def _table(truth: SplitTruth, document: Mapping[str, Any]) -> str:
    lines = [
        f"{document['file']} on {', '.join(truth.splits)}: {document['images']} images, {document['objects']} objects "
        f"(and {document['difficult']} difficult ones, ignored), {document['detections']} detections"
    ]
    if "classes" in document:
        lines.append(f"of these classes alone: {', '.join(document['classes'])}")
    intervals = document.get("bootstrap", {}).get("intervals", {})
    compare = document.get("compare", {}).get("differences", {})
    lines.append("")
    names = [name for name, value in document.items() if isinstance(value, float)]
    width = max(map(len, names))
    header = f"{'':{width}}   value"
    header += f"   {'95 % interval':>16}" if intervals else ""
    header += f"   {'difference':>10}   {'95 % interval':>18}   better in" if compare else ""
    lines.append(header)
    for name in names:
        line = f"{name:{width}}  {number(document[name], '6.4f', 'nan')}"
        if name in intervals:
            line += f"   {number(intervals[name][0], '6.4f', 'nan')} .. {number(intervals[name][1], '6.4f', 'nan')}"
        if name in compare:
            one = compare[name]
            line += f"   {one['difference']:+10.4f}   {one['low']:+8.4f} .. {one['high']:+.4f}"
            line += f"   {100 * one['share_better']:7.1f} %"
        lines.append(line)
    if intervals:
        lines.append(f"(intervals: {document['bootstrap']['resamples']} resamples of the images)")
    if compare:
        lines.append(f"(difference: to {document['compare']['file']}, on the same resamples of the images)")
    if document["classes_without_objects"]:
        lines.append(f"no objects of {', '.join(document['classes_without_objects'])}: left out of the means")
    if not any(name.startswith("proposal_") for name in names):
        lines.append("(proposal recall: needs --proposals; results of detections do not hold proposals)")
    if "error_breakdown" in document:
        lines += ["", *_breakdown_lines(document["error_breakdown"])]
    return "\n".join(lines)


def _breakdown_lines(breakdown: Mapping[str, Any]) -> list[str]:
    rows = [("all classes", [(breakdown["gain"][kind], breakdown["count"][kind]) for kind in KINDS])]
    for name, kinds in breakdown["per_class"].items():
        rows.append((name, [(kinds[kind]["gain"], kinds[kind]["count"]) for kind in KINDS]))
    width = max(len(name) for name, _ in rows)
    lines = ["AP50_voc gained by correcting one kind of error alone (number of errors)"]
    lines.append(" " * width + "".join(f"{kind:>18}" for kind in KINDS))
    for name, cells in rows:
        gains = (f"{number(gain, '9.4f', 'nan')} {f'({count})':>8}" for gain, count in cells)
        lines.append(f"{name:{width}}" + "".join(gains))
    return lines
