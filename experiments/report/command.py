"""`frcnn report`: a grid of runs, finished or not, as one table. Imports what is slow to import only when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detector.errors import InputError
from experiments.output import json_text, writing
from experiments.report.options import ReportOptions

if TYPE_CHECKING:
    from experiments.report.document import Report

FORMATS = ("table", "json", "csv", "html")


def report(options: ReportOptions) -> None:
    """Read a folder of runs, and print or write the report.

    Raises:
        InputError: No runs there, a bad option, a file that cannot be written.
    """
    style = _format(options)
    from experiments.report.document import build_report

    made = build_report(options)
    text = render(made, style)
    if options.output is None:
        sys.stdout.write(text)
        return
    with writing(f"--output {options.output}"):
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text, encoding="utf-8", newline="")
    print(f"{options.output}: {made.document['summary']}", file=sys.stderr)


def render(made: Report, style: str) -> str:
    """The report in one of `FORMATS`."""
    from experiments.report.html import html_page
    from experiments.report.text import csv_table, text_table

    if style == "json":
        return json_text(made.document) + "\n"
    if style == "csv":
        return csv_table(made.document)
    return html_page(made) if style == "html" else text_table(made.document)


def _format(options: ReportOptions) -> str:
    suffix = Path(options.output or "").suffix.removeprefix(".")
    style = options.format or (suffix if suffix in FORMATS else "table")
    if Path(options.output or "x").is_dir():
        raise InputError(
            f"--output {options.output}: is a folder; name a file, such as {options.output}/report.{style}"
        )
    return style
