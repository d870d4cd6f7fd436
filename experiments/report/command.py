"""`frcnn report`: a grid of runs, finished or not, as one table. Imports what is slow to import only when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detector.errors import InputError
from experiments.arguments import Parser, names, quiet

if TYPE_CHECKING:
    from experiments.report.document import Report, ReportOptions

FORMATS = ("table", "json", "csv", "html")


def report(options: ReportOptions) -> None:
    """Read a folder of runs, and print or write the report.

    Raises:
        InputError: No runs there, a bad option, a file that cannot be written.
    """
    style = _format(options)
    if options.bootstrap < 2 and options.bootstrap != 0:
        raise InputError(f"--bootstrap {options.bootstrap}: at least 2 resamples, or 0 for no intervals")
    from experiments.report.document import build_report

    made = build_report(options)
    text = render(made, style)
    if options.output is None:
        sys.stdout.write(text)
        return
    try:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise InputError(f"--output {options.output}: cannot be written ({error.strerror})") from error
    print(f"{options.output}: {made.document['summary']}", file=sys.stderr)


def render(made: Report, style: str) -> str:
    """The report in one of `FORMATS`."""
    from experiments.report.html import html_page
    from experiments.report.text import csv_table, text_table

    if style == "json":
        return json.dumps(made.document, indent=2, allow_nan=False) + "\n"
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


def report_command(arguments: list[str]) -> None:
    """Parse the arguments of `frcnn report`, and run it."""
    parser = Parser(
        "frcnn report",
        description="One row per cell of a grid, or per configuration of ordinary runs: metrics over seeds, "
        "differences to a baseline, anchors, speed. Works while runs are going on.",
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR", help="folder of a grid, or any folder that holds run folders")
    parser.add_argument(
        "--format", choices=["table", "json", "csv", "html"], help="(that of --output's suffix, else table)"
    )
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    parser.add_argument(
        "--metrics", type=names, default=["AP50_voc07"], metavar="[M, ...]", help='(AP50_voc07) such as "[AP, AP50]"'
    )
    parser.add_argument("--baseline", metavar="CELL", help="cell to compare with (the grid's own)")
    parser.add_argument(
        "--part", choices=["val", "test"], help="metrics of which data (test, if any finished run was tested)"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the images (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    options = parser.parse_args(arguments)
    from experiments.report.document import ReportOptions

    quiet()
    report(ReportOptions(**vars(options)))
