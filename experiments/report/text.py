"""A report as a table for the terminal, and as comma-separated values."""

import csv
import io
import re
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.output import number

WIDE = 1000
"""Columns of a table that goes into a file or a pipe: nothing is wrapped there."""


def text_table(document: Mapping[str, Any]) -> str:
    """The report for a terminal, in its width if standard output is one."""
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), width=None if terminal else WIDE, force_terminal=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    headers, rows = table_rows(document)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index <= len(document["axes"]) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text) for text in row))
    console.print(Text(f"{document['name']}: {document['summary']}"))
    console.print()
    console.print(table)
    for line in (*legend(document), *problems(document)):
        console.print(Text(line))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def table_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table, as texts: the axes, the state of the runs, then numbers."""
    cells = document["cells"]
    metrics = list(cells[0]["metrics"])
    compared = document["baseline"] is not None
    differing = [name for name in metrics if any(name in cell["differences"] for cell in cells)]
    paper = any(cell["paper"] is not None for cell in cells)
    headers = [*document["axes"], "runs"]
    for name in metrics:
        headers.append(name)
        headers += ["difference [95 % interval]"] if compared and name in differing else []
    headers += ["paper"] if paper else []
    headers += ["dead anchors", "objects with an anchor of IoU >= 0.5", "images/s", "memory (MiB)"]
    rows = []
    for cell in cells:
        row = [cell["axes"].get(axis, "") for axis in document["axes"]] + [state(cell)]
        for name in metrics:
            row.append(spread(cell["metrics"][name]))
            row += [difference_text(cell, name, document)] if compared and name in differing else []
        row += [number(cell["paper"], ".4f")] if paper else []
        anchors = cell["anchors"] or {}
        row += [dead_anchors(cell), number(anchors.get("share_iou_50"), ".3f")]
        row += [number(cell["images_per_second"], ".1f"), number(cell["peak_memory_mib"], ".0f")]
        rows.append(row)
    return headers, rows


def state(cell: Mapping[str, Any]) -> str:
    """How many runs of a cell are in which state, such as "2 done, 1 failed"."""
    found = [run["status"] for run in cell["runs"]]
    return ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))


def difference_text(cell: Mapping[str, Any], name: str, document: Mapping[str, Any]) -> str:
    """Such as "+0.0312 [+0.0101, +0.0520] *"; the star says that the interval excludes 0."""
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
    """Such as "1 (+ 2 nearly) of 9"."""
    anchors = cell["anchors"]
    if anchors is None:
        return "-"
    nearly = f" (+ {anchors['nearly_dead']} nearly)" if anchors["nearly_dead"] else ""
    return f"{anchors['dead']}{nearly} of {anchors['shapes']}"


def legend(document: Mapping[str, Any]) -> list[str]:
    """What the numbers are, in short lines."""
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
    return lines


def problems(document: Mapping[str, Any]) -> list[str]:
    """A line for each run that is neither done nor waiting, with the numbers that it has so far, and the notes."""
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
    """A row per cell with a header; numbers are plain, unknown ones empty."""
    cells = document["cells"]
    metrics = list(cells[0]["metrics"])
    out = io.StringIO()
    ends = ("difference", "low", "high", "excludes_zero")
    columns = ["name", *document["axes"], "status", "seeds", "done"]
    columns += [f"{name} {end}" for name in metrics for end in ("mean", "std", *ends)]
    columns += ["paper", "anchor_shapes", "dead_anchors", "nearly_dead_anchors", "share_iou_50"]
    columns += ["images_per_second", "peak_memory_mib", "seconds"]
    writer = csv.writer(out)
    writer.writerow(columns)
    for cell in cells:
        anchors = cell["anchors"] or {}
        row = [cell["name"], *(_no_date(cell["axes"].get(axis, "")) for axis in document["axes"]), cell["status"]]
        row += [len(cell["seeds"]), sum(run["status"] == "done" for run in cell["runs"])]
        for name in metrics:
            difference = cell["differences"].get(name, {})
            row += [cell["metrics"][name]["mean"], cell["metrics"][name]["std"], *(difference.get(end) for end in ends)]
        row += [cell["paper"], *(anchors.get(key) for key in ("shapes", "dead", "nearly_dead", "share_iou_50"))]
        row += [cell["images_per_second"], cell["peak_memory_mib"], cell["seconds"]]
        writer.writerow(row)
    return out.getvalue()


def _no_date(label: str) -> str:
    """4-8-16 in brackets: a spreadsheet would take it for a day in 2016."""
    return f"[{label}]" if re.fullmatch(r"[\d.]+([-_][\d.]+)+", label) else label


def spread(metric: Mapping[str, Any]) -> str:
    """Return the mean and the deviation of a metric, such as "0.6000 ± 0.1414"."""
    if metric["mean"] is None:
        return "-"
    return f"{metric['mean']:.4f}" + ("" if metric["std"] is None else f" ± {metric['std']:.4f}")
