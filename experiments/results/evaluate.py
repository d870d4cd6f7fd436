"""`frcnn evaluate`: score the detections of any detector on annotated splits; of files, without images."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.ground_truth import SplitTruth
from detector.metrics.bootstrap import interval
from detector.metrics.class_subset import chosen_classes, of_classes
from detector.metrics.error_breakdown import KINDS, break_down_errors
from detector.metrics.proposal_recall import ProposalRecall, reachable
from detector.metrics.voc_ap import Detections
from experiments.dataset.annotations import read_annotations
from experiments.dataset.formats import dataset_format
from experiments.export.evaluated import detect_split, is_detector
from experiments.output import json_text, number
from experiments.results.error_plot import plot_error_breakdown
from experiments.results.files import read_proposals, read_results
from experiments.results.options import EvaluateOptions
from experiments.results.scores import CLASS_PREFIX, Scored, difference, score

DEFAULT_RESAMPLES = 1000


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate every file of detections and print all numbers.

    JSON: one document of the metric names, `images`, `detections` and more; with several files
    `{"evaluations": [one such document each]}`.

    Raises:
        InputError: Anything wrong with the dataset, the files or the options.
    """
    data = options.data
    whole = read_annotations(dataset_format(options.data_format, data.root, data.image_dirs), data, "val")
    truth = whole
    if options.classes is not None:
        chosen = chosen_classes(options.classes, whole.class_names)
        truth = replace(whole, class_names=chosen, objects=of_classes(whole.objects, whole.class_names, chosen))
    resamples = options.bootstrap or (DEFAULT_RESAMPLES if options.compare is not None else 0)

    def read(path: str) -> Scored:
        trained = is_detector(path)
        found = detect_split(path, options.data_format, data, whole) if trained else read_results(path, whole)
        return score(truth, of_classes(found, whole.class_names, truth.class_names), resamples, options.seed)

    other = None if options.compare is None else read(options.compare)
    recall = {} if options.proposals is None else _proposal_recall(truth, read_proposals(options.proposals, truth))
    documents = [_document(options, resamples, path, read(path), other) | recall for path in options.predictions]
    if options.format == "json":
        print(json_text(documents[0] if len(documents) == 1 else {"evaluations": documents}))
    else:
        print("\n\n".join(_table(truth, document) for document in documents))


def _document(
    options: EvaluateOptions, resamples: int, path: str, ours: Scored, other: Scored | None
) -> dict[str, Any]:
    truth = ours.truth
    unknown = [name for name, value in ours.values.items() if math.isnan(value)]
    document: dict[str, Any] = {
        **ours.values,
        "file": path,
        "splits": list(truth.splits),
        "images": len(truth.image_names),
        "objects": int((~truth.objects.difficult).sum()),
        "difficult": int(truth.objects.difficult.sum()),
        "detections": len(ours.detections),
        **({} if options.classes is None else {"classes": list(truth.class_names)}),
        "classes_without_objects": [n.removeprefix(CLASS_PREFIX) for n in unknown if n.startswith(CLASS_PREFIX)],
    }
    if resamples:
        intervals = {name: interval(samples) for name, samples in ours.samples.items()}
        document["bootstrap"] = {
            "resamples": resamples,
            "seed": options.seed,
            "level": 0.95,
            "intervals": {name: [one.low, one.high] for name, one in intervals.items()},
        }
    if other is not None:
        shown = ("difference", "low", "high", "share_better")
        differences = {name: {key: one[key] for key in shown} for name, one in difference(ours, other).items()}
        document["compare"] = {"file": options.compare, "values": other.values, "differences": differences}
    if options.breakdown or options.plot is not None:
        document["error_breakdown"] = _breakdown(options, path, ours)
    return document


def _breakdown(options: EvaluateOptions, path: str, scored: Scored) -> dict[str, Any]:
    truth = scored.truth
    errors = break_down_errors(scored.detections, truth.objects, range(1, len(truth.class_names) + 1))
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
    best_first = np.argsort(-proposals.score, kind="stable")
    boxes, images = torch.from_numpy(proposals.box[best_first]), proposals.image_id[best_first]
    objects = truth.objects
    columns = {"boxes": objects.box, "labels": objects.label, "difficult": objects.difficult}
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    count = len(truth.image_names)
    metric = ProposalRecall(truth.class_names, reachable(int(np.bincount(images, minlength=1).max())))
    for image, found, there in zip(
        range(count), _by_image(images, count), _by_image(objects.image_id, count), strict=True
    ):
        target = {name: column[there] for name, column in tensors.items()} | {"image_id": torch.tensor(image)}
        metric.update([boxes[found]], [target])
    values = {name: float(value) for name, value in metric.compute().items()}
    per_class = metric.recall_per_class()
    return values | {f"proposal_recall_class@{metric.detail_k}/{name}": value for name, value in per_class.items()}


def _by_image(image_id: NDArray[np.int64], images: int) -> list[NDArray[np.int64]]:
    """Return the rows of each image, in the order in which they stand in the column of image ids."""
    order = np.argsort(image_id, kind="stable")
    return np.split(order, np.searchsorted(image_id[order], np.arange(1, images)))[:images]


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
    rows = {"all classes": {kind: {key: breakdown[key][kind] for key in ("gain", "count")} for kind in KINDS}}
    rows |= breakdown["per_class"]
    width = max(map(len, rows))
    lines = ["AP50_voc gained by correcting one kind of error alone (number of errors)"]
    lines.append(" " * width + "".join(f"{kind:>18}" for kind in KINDS))
    for name, kinds in rows.items():
        found = [(kinds[kind]["gain"], f"({kinds[kind]['count']})") for kind in KINDS]
        lines.append(f"{name:{width}}" + "".join(f"{number(gain, '9.4f', 'nan')} {count:>8}" for gain, count in found))
    return lines
