"""A report as one HTML page that needs nothing else: no network, no script, pictures inside."""

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from detector.errors import InputError
from detector.metrics.curve_figures import curves_figure, png
from detector.metrics.curves import BACKGROUND, MISSED
from experiments.output import templates
from experiments.report.confusion_pictures import draw_cells
from experiments.report.document import SIZE_NAMES, Report
from experiments.report.pictures import anchor_pictures, curves_picture
from experiments.report.text import (
    axis_names,
    difference_text,
    leading_axes,
    legend,
    problems,
    spread,
    state,
    table_rows,
)
from experiments.results.compare_pictures import image_reader
from experiments.results.scored_runs import detection_curves

BLUE, ORANGE, WHITE = (8, 64, 129), (179, 88, 6), (255, 255, 255)
"""Told apart by all kinds of colour vision."""
FILES = ("config.yaml", "metrics.json", "predictions.json", "cell.log", "checkpoints")
MOST_CONFUSIONS = 12
"""Cells of the grid whose confusion matrix and curves are shown."""
MOST_CELL_PICTURES = 300
"""Pictures of detections on the page."""
PICTURES = (".jpg", ".jpeg", ".png")


def html_page(made: Report, folder: Path) -> str:
    """Return the whole page, as `report.html.j2` lays it out.

    Args:
        made: What it tells.
        folder: Where it will be: links to the runs start from there.
    """
    document = made.document
    headers, rows = table_rows(document)
    metric = next(iter(document["cells"][0]["metrics"]))
    varying = [axis for axis, values in document["axes"].items() if len(values) > 1]
    varying.sort(key=lambda axis: axis == "experiment")  # a map is of the options within one
    pages = templates(Path(__file__).parent, autoescape=True)
    pages.filters["base64"] = lambda data: base64.b64encode(data).decode()
    pages.globals |= {"zip": zip, "state": state, "spread": spread, "difference": difference_text}
    pages.globals |= {"background": BACKGROUND, "missed": MISSED}
    anchors = anchor_pictures(made)
    recalls = [
        (cell["name"], what if cell["part"] == document["part"] else f"{what}, {cell['part']}", by_size)
        for cell in document["cells"]
        for what, by_size in cell["recall_by_size"].items()
    ]
    return pages.get_template("report.html.j2").render(
        document=document,
        headers=headers,
        rows=list(zip(document["cells"], rows, strict=True)),
        texts=leading_axes(document) + 1,
        legend=legend(document),
        problems=problems(document),
        metric=metric,
        varying=varying,
        axis_names=axis_names(document),
        maps=_heat_maps(document, varying),
        curves=curves_picture(made),
        recalls=recalls,
        sizes=[size for size in SIZE_NAMES if any(set(by_size[size]) != {None} for _, _, by_size in recalls)],
        compared=[cell for cell in document["cells"] if cell["per_class"]],
        confusions=_confusions(made),
        anchors=anchors,
        anchors_of={name: number for number, (names, _, _) in enumerate(anchors) for name in names},
        files=lambda run: _links(Path(run), folder),
        **_shades(document, metric),
    )


def _confusions(made: Report) -> list[dict[str, Any]]:
    """Return the confusion matrix, curves and pictures of detections of the first run of each cell that was scored."""
    parts = {cell["name"]: cell["part"] for cell in made.document["cells"]}
    first = {cell.name: next((run for run in cell.done if run.folder in made.scored), None) for cell in made.grid.cells}
    shown = [(name, run) for name, run in first.items() if run is not None][:MOST_CONFUSIONS]
    found = []
    for name, run in shown:
        scored = made.scored[run.folder]
        curves = detection_curves(run, scored, parts[name], made.score_threshold)
        pictures, note = {}, None
        try:
            read = image_reader(run, parts[name])
            pictures = draw_cells(read, scored, curves, MOST_CELL_PICTURES // len(shown))
        except InputError as error:
            note = f"no pictures: {error}"
        title = f"{name}, seed {run.seed}, {parts[name]}"
        figure = png(curves_figure({title: curves}), dpi=80)
        found.append({"title": title, "curves": curves, "png": figure, "pictures": pictures, "note": note})
    return found


def _shades(document: Mapping[str, Any], metric: str) -> dict[str, Callable[[Any], str]]:
    """Return what colours a mean of the reported part, a difference of which an interval is known, and a recall."""
    cells = document["cells"]
    means = [cell["metrics"][metric]["mean"] for cell in cells if cell["part"] == document["part"]]
    known = [value for value in means if value is not None] or [0.0]
    low, range_of_means = min(known), max(known) - min(known)
    sure = [one["difference"] for cell in cells for one in cell["per_class"].values() if one["excludes_zero"]]
    largest = max(map(abs, sure), default=1)

    def shade_difference(one: Mapping[str, Any]) -> str:
        value = one["difference"]
        return _color(0.75 * abs(value) / largest, BLUE if value > 0 else ORANGE) if one["excludes_zero"] else ""

    return {
        "shade": lambda mean: _color(0.05 + 0.85 * ((mean - low) / range_of_means if range_of_means else 0.5), BLUE),
        "shade_difference": shade_difference,
        "shade_recall": lambda value: _color(0.9 * value, BLUE),
    }


def _links(run: Path, folder: Path) -> list[tuple[str, str]]:
    """Return names and addresses of what is in a run folder: its files, and folders that hold pictures."""
    counts: dict[Path, int] = {}
    for path in run.rglob("*"):
        if path.suffix.lower() in PICTURES:
            counts[path.parent] = counts.get(path.parent, 0) + 1
    there = [(name, run / name) for name in FILES if (run / name).exists()]
    there += [(f"{count} pictures in {path.name}", path) for path, count in sorted(counts.items())]
    there = [(run.name, run), *there] if run.is_dir() else []
    return [
        (name, quote(os.path.relpath(path.resolve(), folder.resolve()).replace(os.sep, "/"))) for name, path in there
    ]


def _heat_maps(
    document: Mapping[str, Any], varying: Sequence[str]
) -> list[tuple[str, list[str], list[tuple[str, list[Any]]]]]:
    """Return a title, columns and rows of cells for each combination of the axes beyond the first two.

    A cell that is not in the grid is None. A combination that has a single row or column has no map.
    """
    if len(varying) < 2:
        return []
    down, across, *others = varying
    by_place = {tuple(cell["axes"].get(axis) for axis in varying): cell for cell in document["cells"]}
    names = axis_names(document)
    maps = []
    for fixed in dict.fromkeys(place[2:] for place in by_place):
        rows, columns = (
            [label for label in document["axes"][axis] if any(p[side] == label and p[2:] == fixed for p in by_place)]
            for side, axis in enumerate((down, across))
        )
        if len(rows) > 1 and len(columns) > 1:
            title = ", ".join(f"{names[axis]} = {label}" for axis, label in zip(others, fixed, strict=True))
            cells = [(row, [by_place.get((row, column, *fixed)) for column in columns]) for row in rows]
            maps.append((title, columns, cells))
    return maps


def _color(share: float, towards: tuple[int, int, int]) -> str:
    mixed = [round(white + share * (color - white)) for white, color in zip(WHITE, towards, strict=True)]
    dark = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] < 140
    return f"background: rgb({mixed[0]}, {mixed[1]}, {mixed[2]}); color: {'#fff' if dark else '#1c1c1c'}"
