"""A report as a table for the terminal, and as comma-separated values."""

import csv
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.output import number
from experiments.results.runs import MOST_IN_NAMES, has_part

WIDE = 1000
"""Columns of a table that goes into a file or a pipe: nothing is wrapped there."""
ENDS = ("mean", "std", "difference", "low", "high", "excludes_zero")


def text_table(document: Mapping[str, Any]) -> str:
    """Return the report for a terminal, in its width if standard output is one, or in `COLUMNS` columns."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(file=io.StringIO(), width=None if has_width else WIDE, force_terminal=False)
    console.print(Text(f"{document['name']}: {document['summary']}"))
    headers, rows = table_rows(document)
    for columns in _tables([*zip(headers, *rows, strict=True)], console.width):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        whole = sum(max(map(len, column)) + 3 for column in columns) <= console.width + 3
        for header, *cells in columns:
            justify: Any = "left" if header in headers[: leading_axes(document) + 1] else "right"
            width = None if whole else _width([header, *cells])
            table.add_column(Text(header), justify=justify, overflow="fold", width=width)
        for row in list(zip(*columns, strict=True))[1:]:
            table.add_row(*map(Text, row))
        console.print()
        console.print(table)
    for line in (*legend(document), *problems(document)):
        console.print(Text(line))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def _width(column: Sequence[str]) -> int:
    """Return the width of a column, whose header may be broken between words."""
    return max(len(text) for text in (*column[0].split(), *column[1:]))


def _tables(columns: Sequence[Sequence[str]], width: int) -> list[list[Sequence[str]]]:
    """Divide a table that is too wide into several, whose rows are numbered."""

    def fit(some: Sequence[Sequence[str]]) -> bool:
        return sum(_width(column) + 3 for column in some) <= width + 3

    if fit(columns):
        return [list(columns)]
    numbers = ["row", *(str(number) for number in range(1, len(columns[0])))]
    tables: list[list[Sequence[str]]] = [[numbers]]
    for column in columns:
        if len(tables[-1]) > 1 and not fit([*tables[-1], column]):
            tables.append([numbers])
        tables[-1].append(column)
    return tables


def table_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells of the table, as texts: leading axes, the state of the runs, numbers, other axes."""
    rows = [_shown(cell, document) for cell in document["cells"]]
    return [header for header, _ in rows[0]], [[text for _, text in row] for row in rows]


def axis_names(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what axes are called: by the last part of an option, where that tells it from the others."""
    last = [axis.rsplit(".", 1)[-1] for axis in document["axes"]]
    return {axis: one if last.count(one) == 1 else axis for axis, one in zip(document["axes"], last, strict=True)}


def leading_axes(document: Mapping[str, Any]) -> int:
    """Return how many axes stand before the numbers: of many, those that tell the rows apart; others follow."""
    whole, labels = len(document["axes"]), [list(cell["axes"].values()) for cell in document["cells"]]
    if whole <= MOST_IN_NAMES:
        return whole
    return next((n for n in range(1, whole) if len({tuple(row[:n]) for row in labels}) == len(labels)), whole)


def _shown(cell: Mapping[str, Any], document: Mapping[str, Any]) -> list[tuple[str, str]]:
    axes = [(name, cell["axes"].get(axis, "")) for axis, name in axis_names(document).items()]
    first = leading_axes(document)
    row = [*axes[:first], ("runs", state(cell))]
    for name in cell["metrics"]:
        row.append((name, spread(cell, name, document)))
        if document["baseline"] is not None and any(name in other["differences"] for other in document["cells"]):
            row.append(("difference [95 % interval]", difference_text(cell, name, document)))
    if any(other["paper"] is not None for other in document["cells"]):
        row.append(("paper", number(cell["paper"], ".4f")))
    return [
        *row,
        ("dead anchors", dead_anchors(cell)),
        ("objects with an anchor of IoU >= 0.5", number((cell["anchors"] or {}).get("share_iou_50"), ".3f")),
        ("images/s", number(cell["images_per_second"], ".1f")),
        ("memory (MiB)", number(cell["peak_memory_mib"], ".0f")),
        *axes[first:],
    ]


def state(cell: Mapping[str, Any]) -> str:
    """Return how many runs of a cell are in which state, such as "2 done, 1 failed (+ 1 repeated)"."""
    found = [run["status"] for run in cell["runs"]]
    repeats = f" (+ {len(cell['repeats'])} repeated)" if cell["repeats"] else ""
    return ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found)) + repeats


def difference_text(cell: Mapping[str, Any], name: str, document: Mapping[str, Any]) -> str:
    """Return a difference such as "+0.0312 [+0.0101, +0.0520] *"; the star says that the interval excludes 0."""
    if cell["name"] == document["baseline"]:
        return "baseline"
    one = cell["differences"].get(name)
    if one is None or one["difference"] is None:
        return "-"
    if one["low"] is None:
        return f"{one['difference']:+.4f}"
    star = " *" if one["excludes_zero"] else ""
    return f"{one['difference']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]{star}"


def dead_anchors(cell: Mapping[str, Any]) -> str:
    """Return a count such as "1 (+ 2 nearly) of 9"."""
    anchors = cell["anchors"]
    if anchors is None:
        return "-"
    nearly = f" (+ {anchors['nearly_dead']} nearly)" if anchors["nearly_dead"] else ""
    return f"{anchors['dead']}{nearly} of {anchors['shapes']}"


def legend(document: Mapping[str, Any]) -> list[str]:
    """Return what the numbers are, in short lines."""
    lines = [
        f"({document['part']} metrics of finished runs: mean ± standard deviation over seeds; no deviation of one seed)"
    ]
    if document["baseline"] is not None and document["bootstrap"]["resamples"]:
        lines.append(
            f"(difference: to {document['baseline']}, mean over the seeds that both have finished; interval from "
            f"{document['bootstrap']['resamples']} paired resamples of the images, * where it excludes 0. It tells how "
            "far the choice of images moves it, not the training seed: compare it with the deviation, too)"
        )
    elif document["baseline"] is None:
        lines.append("(no baseline: name a cell by --baseline for differences)")
    if any(cell["part"] != document["part"] for cell in document["cells"]):
        lines.append("(val: validation metrics, of rows that were not tested; not to be compared with test metrics)")
    return lines


def problems(document: Mapping[str, Any]) -> list[str]:
    """Return a line for each run that is neither done nor waiting, with its numbers so far, and the notes."""
    lines = []
    for cell in document["cells"]:
        for run in cell["runs"]:
            if run["status"] in ("done", "pending", "missing"):
                continue
            text = f"{run['status']}: {cell['name']}, seed {run['seed']}"
            text += f": {run['error']}" if run["error"] else ""
            for tag, point in run["so_far"].items():
                epoch = "" if point["epoch"] is None else f" after epoch {point['epoch']:g}"
                text += f"; {tag} {point['value']:.4f}{epoch}"
            lines.append(text)
    return [*lines, *(f"note: {note}" for note in document["notes"])]


def csv_table(document: Mapping[str, Any]) -> str:
    """Return a row per cell with a header; numbers are plain, unknown ones empty."""
    rows = [_plain(cell, document["axes"]) for cell in document["cells"]]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header for header, _ in rows[0])
    writer.writerows([value for _, value in row] for row in rows)
    return out.getvalue()


def _plain(cell: Mapping[str, Any], axes: Iterable[str]) -> list[tuple[str, Any]]:
    row = [("name", cell["name"]), *((axis, _no_date(cell["axes"].get(axis, ""))) for axis in axes)]
    row += [("status", cell["status"]), ("seeds", len(cell["seeds"]))]
    row += [("done", sum(run["status"] == "done" for run in cell["runs"])), ("part", cell["part"])]
    for name, metric in cell["metrics"].items():
        known = cell["differences"].get(name, {}) | metric
        row += [(f"{name} {end}", known.get(end)) for end in ENDS]
    anchors = cell["anchors"] or {}
    row += [("paper", cell["paper"]), ("anchor_shapes", anchors.get("shapes")), ("dead_anchors", anchors.get("dead"))]
    row += [("nearly_dead_anchors", anchors.get("nearly_dead")), ("share_iou_50", anchors.get("share_iou_50"))]
    return row + [(key, cell[key]) for key in ("images_per_second", "peak_memory_mib", "seconds")]


def _no_date(label: str) -> str:
    """Put labels such as 4-8-16 into brackets, which a spreadsheet would take for a day in 2016."""
    return f"[{label}]" if re.fullmatch(r"[\d.]+([-_][\d.]+)+", label) else label


def spread(cell: Mapping[str, Any], name: str, document: Mapping[str, Any]) -> str:
    """Return the mean and the deviation of a metric, such as "0.6000 ± 0.1414"; "val" before those of no test."""
    metric = cell["metrics"][name]
    if metric["mean"] is None:
        return "-"
    other = "" if cell["part"] == document["part"] or has_part(name) else f"{cell['part']} "
    return other + f"{metric['mean']:.4f}" + ("" if metric["std"] is None else f" ± {metric['std']:.4f}")
