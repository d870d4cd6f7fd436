"""What two runs' detections tell apart beyond AP: what AP is lost to, confusions of classes, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detector.files import write_whole
from detector.metrics.curve_figures import confusion_figure, curves_figure, png
from detector.metrics.curves import BACKGROUND, MISSED
from experiments.output import writing

MOST_CONFUSIONS = 8


def compare_curves(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Compare what `curves_of` tells of two runs on the same images and classes.

    Returns:
        `a`, `b` and `difference` of AP50 `lost_to` each kind of error, and of `calibration_error`; `confusions`, the
        mistakes of the confusion matrix that differ most, with `object`, `detected`, `a`, `b`.
    """
    lost, errors = ([one["errors"]["gain"] for one in (a, b)], [one["scores"]["calibration_error"] for one in (a, b)])
    counts = np.array([a["confusion"], b["confusion"]])
    change = counts[1] - counts[0]
    np.fill_diagonal(change, 0)  # objects that are found
    order = np.argsort(-abs(change), axis=None, kind="stable")[:MOST_CONFUSIONS]
    names = a["class_names"]
    return {
        "lost_to": {kind: both(*(gain[kind] for gain in lost)) for kind in lost[0]},
        "calibration_error": both(*errors),
        "confusions": [
            {
                "object": [*names, BACKGROUND][row],
                "detected": [*names, MISSED][column],
                "a": int(counts[0, row, column]),
                "b": int(counts[1, row, column]),
            }
            for row, column in zip(*np.unravel_index(order, change.shape), strict=True)
            if change[row, column]
        ],
    }


def both(a: float | None, b: float | None) -> dict[str, float | None]:
    """Return two values and their difference, of which no interval is known."""
    return {"a": a, "b": b, "difference": None if a is None or b is None else b - a, "low": None}


def draw_curves(curves: Sequence[Mapping[str, Any]], names: Sequence[str], folder: str) -> list[str]:
    """Write the runs' curves and confusion matrices side by side, `curves.png` and `confusion.png`; return their paths.

    Raises:
        InputError: The folder cannot be written.
    """
    titled = {f"{side}  {name}": one for side, name, one in zip("AB", names, curves, strict=True)}
    paths = []
    for name, draw in (("curves", curves_figure), ("confusion", confusion_figure)):
        paths.append(str(Path(folder) / f"{name}.png"))
        with writing(f"--output {folder}"):
            write_whole(Path(paths[-1]), png(draw(titled), dpi=90))
    return paths
