"""How commands show what they found: numbers, durations, JSON without NaN, pictures."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from detector.errors import InputError
from detector.files import without_nan

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure  # takes a second to import

PLOT_SUFFIXES: Final = (".png", ".pdf", ".svg")


def templates(folder: Path, **options: Any) -> "Environment":
    """Return jinja2's environment of the templates in a folder; each name that they use has to be given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only what writes a page needs it

    options |= {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, **options)


def number(value: float | None, style: str, unknown: str = "-") -> str:
    """Return a number as `format` writes it; `unknown`, in the same width, for None and nan."""
    if value is None or math.isnan(value):
        return unknown.rjust(int(style.lstrip("+").partition(".")[0] or 0))
    return format(value, style)


def percent(share: float, style: str = "5.1f") -> str:
    """Return a share as per cent, such as " 12.5 %"; "-" in the same width for nan."""
    text = number(100 * share, style)
    return f"{text} %" if share == share else f"  {text}"


def counted(many: int, what: str) -> str:
    """Return such as "1 epoch" or "2 epochs"."""
    return f"{many} {what}" if many == 1 else f"{many} {what}s"


def duration(seconds: float) -> str:
    """Return a time such as 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def option_text(value: Any) -> str:
    """Return the value of an option as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def json_text(document: Any) -> str:
    """Return what `--format json` prints: one document."""
    return json.dumps(without_nan(document), indent=2, allow_nan=False)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Make bad input of an error in writing a file, which `what` names with its option.

    Raises:
        InputError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: cannot be written ({error.strerror or error})") from error


def check_plot(path: str | Path) -> None:
    """Check that the file that --plot names is one that can be drawn, before anything is computed.

    Raises:
        InputError: It ends otherwise.
    """
    if Path(path).suffix not in PLOT_SUFFIXES:
        raise InputError(f"--plot {path}: the file must end with .png, .pdf or .svg")


def save_plot(figure: "Figure", path: str | Path, dpi: int) -> None:
    """Write a figure of matplotlib into the file that --plot names; its folder is made.

    Raises:
        InputError: The file cannot be written.
    """
    from detector.metrics.curve_figures import save_figure  # here, because that imports torch

    check_plot(path)
    with writing(f"--plot {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path, dpi)
