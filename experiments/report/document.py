"""What is told about a folder of runs, as one document: rows, differences to the baseline, anchors."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jsonargparse import dict_to_namespace

from detector.errors import InputError, brief, listed
from detector.faster_rcnn import LOSS_NAMES
from detector.files import without_nan
from detector.metrics.coco_ap import SIZES
from detector.metrics.proposal_recall import TOP_K, reachable
from detector.parts import say_strangers
from experiments.anchors.audit import AuditResult
from experiments.anchors.audited_data import AuditInput, audit_input
from experiments.output import option_text
from experiments.report.options import ReportOptions
from experiments.results.curves import Curve, read_curves
from experiments.results.runs import (
    Run,
    RunGroup,
    RunsFolder,
    deviation,
    has_part,
    mean,
    most_proposals,
    read_folder,
    run_folders,
)
from experiments.results.scored_runs import Scorer, data_options
from experiments.results.scores import CLASS_PREFIX, Scored, average, difference, recall_by_size

VOC_ONLY = ("AP50_voc07", "AP50_voc")
"""Metrics whose intervals need none of COCO's, which take most of the time."""
SIZE_NAMES = ("all", *SIZES)
CURVES = ("train/loss", "train/images_per_second", "train/peak_memory_mib")
MARGINS = {
    "Seeds: losses": [f"{part}/{name}" for name in ("loss", *LOSS_NAMES) for part in ("train", "val")],
    "Seeds: average precision": [f"val/{name}" for name in ("AP50_voc07", "AP50_voc", "AP", "AP50", "AP75")],
    "Seeds: recall of proposals": [f"val/proposal_recall@{k}" for k in TOP_K],
}
"""Tags of curves whose mean and spread over seeds TensorBoard can show, by the title of their page."""
MARGIN_TAGS = [tag for tags in MARGINS.values() for tag in tags]


@dataclass
class Report:
    """Hold a grid and everything that is told about it.

    Attributes:
        grid: The runs.
        document: What `--format json` prints.
        curves: Of each run that has logged something, by folder.
        audits: By cell name, of cells whose anchors could be audited.
        scored: By folder, runs whose detections could be scored, on the data that their row shows.
        score_threshold: Of confusion matrices.
    """

    grid: RunsFolder
    document: dict[str, Any]
    curves: Mapping[Path, Mapping[str, Curve]]
    audits: Mapping[str, tuple[AuditInput, AuditResult]]
    scored: Mapping[Path, Scored]
    score_threshold: float


def build_report(options: ReportOptions) -> Report:
    """Return everything that is told about a folder of runs; a run that lacks something is noted, and stops nothing.

    Raises:
        InputError: No runs there, no such baseline, or a metric that no run has.
    """
    grid = read_folder(options.runs_dir, options.baseline)
    runs = [run for cell in grid.cells for run in cell.runs]
    tested = any(f"test/{VOC_ONLY[0]}" in run.metrics for run in runs)
    # Tests, if any finished run has one: validations chose nothing but may have been looked at.
    part = options.part or ("test" if tested else "val")
    parts = {cell.name: options.part or _part(cell, part) for cell in grid.cells}
    names = list(dict.fromkeys([*options.metrics, _recall(runs)]))
    _check_metrics(options.metrics, part, runs)
    validated = [f"val/{name}" for name in options.metrics if not has_part(name)]
    tags = (*CURVES, *validated, *(MARGIN_TAGS if options.tensorboard else ()))
    curves = {run.folder: read_curves(run.folder, tags) for run in runs}
    notes = [line for cell in grid.cells for line in _repeats(cell, parts[cell.name])]
    audits = _audits(grid, notes)
    resamples = options.bootstrap if grid.baseline is not None else 0
    scored: dict[Path, Scored] = {}
    if resamples or options.style in ("html", "json"):
        coco = not set(options.metrics) <= set(VOC_ONLY)
        scorers = {one: Scorer(one, resamples, options.seed, coco) for one in set(parts.values())}
        for cell in grid.cells:
            scored |= _scored(cell, scorers[parts[cell.name]], notes)
    cells = []
    for cell in grid.cells:
        row = _row(cell, parts[cell.name], names, curves)
        row["recall_by_size"] = _recall_by_size(cell, parts[cell.name], scored)
        comparable = grid.baseline is not None and parts[cell.name] == parts[grid.baseline.name]
        differences = _differences(cell, grid.baseline if comparable else None, scored, notes)
        row["differences"] = {name: one for name, one in differences.items() if name in names}
        row["per_class"] = {name: one for name, one in differences.items() if name.startswith(CLASS_PREFIX)}
        row["anchors"] = _anchors(*audits[cell.name]) if cell.name in audits else None
        cells.append(row)
    for name in names:
        done = [(run, parts[cell.name]) for cell in grid.cells for run in cell.done]
        without = [run.folder.name for run, own in done if run.metric(name, own) is None]
        notes += [f"finished, but without {part} {name}: {listed(without, 3)}"] if without else []
    notes += _of_other_data(grid)
    counts = dict(Counter(run.status for run in runs))
    summary = f"{len(grid.cells)} cells, {len(runs)} runs: "
    summary += ", ".join(f"{number} {status}" for status, number in counts.items())
    repeats = sum(len(cell.repeats) for cell in grid.cells)
    summary += f"; {repeats} more repeat a seed" if repeats else ""
    document = {
        "name": grid.name,
        "folder": str(grid.folder),
        "summary": summary,
        "part": part,
        "baseline": grid.baseline.name if grid.baseline is not None else None,
        "bootstrap": {"resamples": options.bootstrap, "seed": options.seed, "level": 0.95},
        "axes": grid.axes,
        "counts": counts,
        "cells": cells,
        "notes": list(dict.fromkeys(notes)),
    }
    return Report(grid, without_nan(document), curves, audits, scored, options.score_threshold)


def _of_other_data(grid: RunsFolder) -> list[str]:
    """Return what there is to say of runs that are not counted, or counted by other classes."""
    runs = [run for cell in grid.cells for run in cell.runs]
    chosen = [f"{run.folder.name} {option_text(run.metrics['classes'])}" for run in runs if run.metrics.get("classes")]
    known = {run.folder for run in runs} | {run.folder for cell in grid.cells for run, _ in cell.repeats}
    folders = [one for one in run_folders(grid.folder) if known.isdisjoint([one, *one.parents])]
    others = [str(one.relative_to(grid.folder)) for one in folders]
    notes = [f"metrics of some classes alone: {listed(chosen, 3)}"] if chosen else []
    return notes + ([f"no cells of the grid, and not counted: {listed(others, 3)}"] if others else [])


def _part(cell: RunGroup, part: str) -> str:
    """Return the part of the data whose metrics a row shows: validations where none of its finished runs was tested."""
    found = [any(f"{one}/{VOC_ONLY[0]}" in run.metrics for run in cell.done) for one in (part, "val")]
    return "val" if found == [False, True] else part


def _recall(runs: Sequence[Run]) -> str:
    """Return the recall that every run can have, of 300 proposals, as in the paper, or of the next smaller number."""
    logged = [{int(k) for k in re.findall(r"/proposal_recall@(\d{1,9})\b", " ".join(run.metrics))} for run in runs]
    numbers = [
        of_run or set(reachable(most_proposals(run.config) or TOP_K[-1]))
        for run, of_run in zip(runs, logged, strict=True)
    ]
    common = set.intersection(*numbers) or set.union(*numbers)
    return f"proposal_recall@{max((k for k in common if k <= 300), default=300)}"


def _recall_by_size(cell: RunGroup, part: str, scored: Mapping[Path, Scored]) -> dict[str, dict[str, list[float]]]:
    """Return the recall of proposals and of detections, as means over seeds, where it is known."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in cell.done:
        table = (run.metrics.get("proposal_recall_by_size") or {}).get(part)
        if isinstance(table, dict) and {"k", *SIZE_NAMES} <= table.keys():
            found.setdefault(f"proposals@{table['k']}", []).append(table)
    found["detections"] = [recall_by_size(scored[run.folder]) for run in cell.done if run.folder in scored]
    return {
        name: {size: np.mean([np.array(one[size], float) for one in tables], axis=0).tolist() for size in SIZE_NAMES}
        for name, tables in found.items()
        if tables
    }


def _repeats(cell: RunGroup, part: str) -> list[str]:
    """Return a line for each run that repeats the seed of another."""
    lines = []
    for run, instead in cell.repeats:
        line = f"{cell.name}: {run.folder.name} repeats seed {run.seed} of {instead.folder.name}"
        again, first = (one.metric(VOC_ONLY[0], part) for one in (run, instead))
        if again is not None and first is not None:
            line += f", with {again - first:+.4f} in {part}/{VOC_ONLY[0]}"
        lines.append(f"{line}: not counted")
    return lines


def _check_metrics(metrics: Sequence[str], part: str, runs: Sequence[Run]) -> None:
    done = [run for run in runs if run.status == "done"]
    known = {name for run in done for name in run.metrics}
    for name in metrics:
        if done and not {name, f"{part}/{name}", f"val/{name}", f"test/{name}"} & known:
            shown = sorted(n.removeprefix(f"{part}/") for n in known if n.startswith(f"{part}/") and "_class" not in n)
            raise InputError(f"--metrics {name}: no run has it; there are {', '.join(shown)}")


def _row(cell: RunGroup, part: str, names: Sequence[str], curves: Mapping[Path, Mapping[str, Curve]]) -> dict[str, Any]:
    metrics = {}
    for name in names:
        values = [run.metric(name, part) if run.status == "done" else None for run in cell.runs]
        metrics[name] = {"mean": mean(values), "std": deviation(values), "values": values}

    def logged(tag: str) -> float | None:
        return mean(median(curves[run.folder][tag].values) for run in cell.runs if tag in curves[run.folder])

    return {
        "name": cell.name,
        "axes": dict(cell.axes),
        "status": cell.status,
        "part": part,
        "seeds": [run.seed for run in cell.runs],
        "repeats": [_run(run, {}) for run, _ in cell.repeats],
        "runs": [_run(run, curves[run.folder]) for run in cell.runs],
        "metrics": metrics,
        "images_per_second": logged("train/images_per_second"),
        "peak_memory_mib": logged("train/peak_memory_mib"),
        "seconds": mean(run.seconds for run in cell.done),
        "paper": cell.paper,
    }


def _run(run: Run, curves: Mapping[str, Curve]) -> dict[str, Any]:
    shown = {tag: curve for tag, curve in curves.items() if tag.startswith("val/") and run.status != "done"}
    return {
        "seed": run.seed,
        "status": run.status,
        "folder": str(run.folder),
        "error": run.error,
        "seconds": run.seconds,
        "so_far": {tag: {"epoch": curve.epochs[-1], "value": curve.values[-1]} for tag, curve in shown.items()},
    }


def _scored(cell: RunGroup, scorer: Scorer, notes: list[str]) -> dict[Path, Scored]:
    """Score every finished run of a cell whose detections are there."""
    found = {}
    for run in cell.done:
        if run.metric(VOC_ONLY[0], scorer.part) is None:
            continue  # noted already
        try:
            found[run.folder] = scorer.score(run)
        except InputError as error:
            notes.append(f"no {'interval' if scorer.resamples else 'recall by size'} for {run.folder.name}: {error}")
    return found


def _differences(
    cell: RunGroup, baseline: RunGroup | None, scored: Mapping[Path, Scored], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """Compare means over seeds on the same resamples, and seed by seed."""
    if baseline is None or cell is baseline:
        return {}
    ours = [run for run in cell.done if run.folder in scored]
    theirs = [run for run in baseline.done if run.folder in scored]
    pairs = [(run, other) for run in ours for other in theirs if run.seed == other.seed and run.seed is not None]
    paired = bool(pairs)
    if paired:  # equal seeds on both sides, so that a seed that only one of them has finished does not shift the mean
        ours, theirs = [run for run, _ in pairs], [other for _, other in pairs]
    if not ours or not theirs:
        return {}
    try:
        total = difference(*(average([scored[run.folder] for run in runs]) for runs in (ours, theirs)))
        single = [(run.seed, difference(scored[run.folder], scored[other.folder])) for run, other in pairs]
    except InputError as error:
        notes.append(f"{cell.name}: {error}")
        return {}
    return {
        name: one
        | {
            "seeds": [run.seed for run in ours] if paired else None,
            "std": deviation(by_name[name]["difference"] for _, by_name in single),
            "per_seed": [{"seed": seed, **by_name[name]} for seed, by_name in single],
        }
        for name, one in total.items()
    }


def _audits(grid: RunsFolder, notes: list[str]) -> dict[str, tuple[AuditInput, AuditResult]]:
    """Audit each cell's anchors; equal ones once."""
    made: dict[str, tuple[AuditInput, AuditResult]] = {}
    found = {}
    for cell in grid.cells:
        run = next((run for run in cell.runs if run.config), None)
        if run is None:
            continue
        try:
            model, data = run.config.get("model") or {}, data_options(run)
            about = {key: model[key] for key in ("anchors", "image", "rpn", "difficult")}
            lists = None if data.get("val_fraction") is None else run.folder / "splits"  # each run has its own
            key = json.dumps([about, model["backbone"]["name"], data["root"], data["train_splits"], lists], default=str)
            if key not in made:
                data_format = run.config.get("data_format", "voc")
                config = dict_to_namespace({"model": model, "data": data, "data_format": data_format})
                say_strangers(run.folder / "config.yaml", run.config)
                given = audit_input(config, [lists] if lists else [])
                made[key] = given, given.audit()
            found[cell.name] = made[key]
        except (InputError, KeyError, TypeError, ValueError) as error:
            notes.append(f"{cell.name}: no anchor audit ({brief(error)})")
    return found


def _anchors(given: AuditInput, result: AuditResult) -> dict[str, Any]:
    dead = [warning for warning in result.warnings if "dead anchor: " in warning]
    keys = ["scales", "aspect_ratios"] if given.anchors.sizes is None else ["sizes"]
    return {
        **{key: getattr(given.anchors, key) for key in keys},
        "shapes": len(result.anchors),
        "dead": sum(warning.startswith("dead") for warning in dead),
        "nearly_dead": sum(warning.startswith("nearly") for warning in dead),
        "warnings": dead,
        **{key: getattr(result, key) for key in ("straddling", "mean_best_iou", "share_iou_50", "share_iou_70")},
    }
