"""The pictures of a report, as PNG: curves over epochs, and the anchors of each cell among the objects."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detector.metrics.curve_figures import png
from experiments.anchors.plot import audit_figure
from experiments.results.curves import Curve
from experiments.results.runs import RunGroup

if TYPE_CHECKING:
    from experiments.report.document import Report

MOST_ANCHOR_PICTURES = 24


def curves_picture(made: "Report") -> bytes | None:
    """Draw the first metric on the validation data and the training loss; None where nothing was logged."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # here, because it takes a second to import

    name = next(iter(made.document["cells"][0]["metrics"]))
    tags = [tag for tag in (f"val/{name}", "train/loss") if any(tag in curves for curves in made.curves.values())]
    cells = [cell for cell in made.grid.cells if any(made.curves[run.folder] for run in cell.runs)]
    if not tags or not cells:
        return None
    colors = colormaps["tab10" if len(cells) <= 10 else "tab20" if len(cells) <= 20 else "turbo"]
    rows = math.ceil(len(cells) / 3)
    figure = Figure(figsize=(13, 4.4 + 0.22 * rows), layout="constrained")
    panels = figure.subplots(1, len(tags), squeeze=False)[0]
    for axes, tag in zip(panels, tags, strict=True):
        for index, cell in enumerate(cells):
            color = colors(index) if len(cells) <= 20 else colors(index / (len(cells) - 1))
            _draw_cell(axes, cell, tag, made.curves, color)
        axes.set_xlabel("epoch")
        axes.set_title(tag if tag.startswith("val/") else f"{tag}, mean of each epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return png(figure, dpi=110)


def _draw_cell(axes: Any, cell: RunGroup, tag: str, curves: Mapping[Path, Mapping[str, Curve]], color: Any) -> None:
    runs = [_by_epoch(curves[run.folder][tag]) for run in cell.runs if tag in curves[run.folder]]
    for run in runs if len(runs) > 1 else ():
        axes.plot(list(run), list(run.values()), color=color, linewidth=0.8, alpha=0.45)
    epochs = sorted({epoch for run in runs for epoch in run})
    means = [float(np.mean([run[epoch] for run in runs if epoch in run])) for epoch in epochs]
    axes.plot(epochs, means, color=color, linewidth=2, marker="o", markersize=3, label=cell.name)


def _by_epoch(curve: Curve) -> dict[float, float]:
    """Return the mean of what was logged in each epoch."""
    values: dict[float, list[float]] = {}
    for epoch, value in zip(curve.epochs, curve.values, strict=True):
        if math.isfinite(epoch) and math.isfinite(value):
            values.setdefault(epoch, []).append(value)
    return {epoch: float(np.mean(values[epoch])) for epoch in sorted(values)}


def anchor_pictures(made: "Report") -> list[tuple[list[str], list[str], bytes]]:
    """Return for each set of anchors the cells that have it, the audit's warnings, and its picture."""
    groups: dict[int, list[str]] = {}
    for name, (given, _) in made.audits.items():
        groups.setdefault(id(given), []).append(name)
    pictures = []
    for names in list(groups.values())[:MOST_ANCHOR_PICTURES]:
        given, result = made.audits[names[0]]
        if given.kept.any():
            title = f"{', '.join(given.truth.splits)}: {result.images} images, {result.objects:g} objects"
            pictures.append((names, result.warnings, png(audit_figure(given, result, title), dpi=100)))
    return pictures
