"""How commands show what they found: durations, plots, JSON without NaN."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from detector.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes a second to import

PLOT_SUFFIXES: Final = (".png", ".pdf", ".svg")


def without_nan(value: Any) -> Any:
    """The same with None for nan, and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


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
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:  # no permission; a suffix that matplotlib does not know
        raise InputError(f"--plot {path}: cannot be written ({' '.join(str(error).split())})") from error
