"""`frcnn report`: a grid of runs, finished or not, as one table."""

import sys
from pathlib import Path

from experiments.output import json_text, writing
from experiments.report.document import build_report
from experiments.report.html import html_page
from experiments.report.margins import FOLDER, write_margins
from experiments.report.options import ReportOptions
from experiments.report.text import csv_table, text_table


def report(options: ReportOptions) -> None:
    """Read a folder of runs, and print or write the report.

    Raises:
        InputError: No runs there, a bad option, a file that cannot be written.
    """
    output, style, made = options.output, options.style, build_report(options)
    if options.tensorboard:
        with writing(f"--tensorboard {made.grid.folder / FOLDER}"):
            written = write_margins(made)
        print(f"{made.grid.folder / FOLDER}: mean and spread of {len(written)} rows of several seeds", file=sys.stderr)
    if style == "html":
        text = html_page(made, Path(output or "report.html").parent)
    elif style == "json":
        text = json_text(made.document) + "\n"
    else:
        text = csv_table(made.document) if style == "csv" else text_table(made.document)
    if output is None:
        sys.stdout.write(text)
        return
    with writing(f"--output {output}"):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8", newline="")
    print(f"{output}: {made.document['summary']}", file=sys.stderr)
