"""A report as one HTML page that needs nothing else: no network, no script, pictures inside."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report.document import Report
from experiments.report.pictures import anchor_pictures, curves_picture
from experiments.report.text import difference_text, legend, problems, spread, state, table_rows

BLUE, RED, GREEN, WHITE = (8, 64, 129), (178, 40, 40), (24, 120, 56), (255, 255, 255)


def html_page(made: Report) -> str:
    """Return the whole page, as `report.html.j2` lays it out."""
    document = made.document
    headers, rows = table_rows(document)
    metric = next(iter(document["cells"][0]["metrics"]))
    means = [cell["metrics"][metric]["mean"] for cell in document["cells"]]
    known = [value for value in means if value is not None] or [0.0]
    low, range_of_means = min(known), max(known) - min(known)
    compared = [cell for cell in document["cells"] if cell["per_class"]]
    changes = [abs(one["difference"] or 0) for cell in compared for one in cell["per_class"].values()]
    largest = max(changes, default=0) or 1
    varying = [axis for axis, values in document["axes"].items() if len(values) > 1]

    def shade(mean: float) -> str:
        return _color(0.05 + 0.85 * ((mean - low) / range_of_means if range_of_means else 0.5), BLUE)

    def shade_difference(value: float) -> str:
        return _color(0.75 * abs(value) / largest, GREEN if value > 0 else RED)

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["base64"] = lambda data: base64.b64encode(data).decode()
    pages.globals |= {"zip": zip, "state": state, "spread": spread, "difference": difference_text}
    return pages.get_template("report.html.j2").render(
        document=document,
        headers=headers,
        rows=list(zip(document["cells"], rows, strict=True)),
        texts=len(document["axes"]) + 1,
        legend=legend(document),
        problems=problems(document),
        metric=metric,
        varying=varying,
        maps=_heat_maps(document, varying),
        shade=shade,
        curves=curves_picture(made),
        compared=compared,
        shade_difference=shade_difference,
        anchors=anchor_pictures(made),
    )


def _heat_maps(document: Mapping[str, Any], varying: Sequence[str]) -> list[tuple[str, list[list[Any]]]]:
    """Return a title and the cells by row and column for each combination of the axes beyond the first two.

    A cell that is not in the grid is None.
    """
    if len(varying) < 2:
        return []
    down, across, *others = varying
    by_place = {tuple(cell["axes"].get(axis) for axis in varying): cell for cell in document["cells"]}
    maps = []
    for fixed in itertools.product(*(document["axes"][axis] for axis in others)):
        cells = [
            [by_place.get((row, column, *fixed)) for column in document["axes"][across]]
            for row in document["axes"][down]
        ]
        if any(cell is not None for line in cells for cell in line):
            maps.append((", ".join(f"{axis} = {label}" for axis, label in zip(others, fixed, strict=True)), cells))
    return maps


def _color(share: float, towards: tuple[int, int, int]) -> str:
    mixed = [round(white + share * (color - white)) for white, color in zip(WHITE, towards, strict=True)]
    dark = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] < 140
    return f"background: rgb({mixed[0]}, {mixed[1]}, {mixed[2]}); color: {'#fff' if dark else '#1c1c1c'}"
