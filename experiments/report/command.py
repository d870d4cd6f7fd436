"""`frcnn report`: a grid of runs, finished or not, as one table. Imports what is slow to import only when it runs."""

import sys
from pathlib import Path

from detector.errors import InputError
from experiments.output import json_text, writing
from experiments.report.options import ReportOptions

FORMATS = ("table", "json", "csv", "html")


def report(options: ReportOptions) -> None:
    """Read a folder of runs, and print or write the report.

    Raises:
        InputError: No runs there, a bad option, a file that cannot be written.
    """
    output = options.output
    suffix = Path(output or "").suffix.removeprefix(".")
    style = options.format or (suffix if suffix in FORMATS else "table")
    if output is not None and Path(output).is_dir():
        raise InputError(f"--output {output}: is a folder; name a file, such as {output}/report.{style}")
    from experiments.report.document import build_report
    from experiments.report.html import html_page
    from experiments.report.text import csv_table, text_table

    made = build_report(options)
    if style == "html":
        text = html_page(made)
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
