"""The breakdown of AP50 into errors, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from detector.metrics.error_breakdown import KINDS, ErrorBreakdown
from experiments.output import save_plot

COLORS: Final = ("#0072b2", "#e69f00", "#cc79a7", "#009e73", "#999999", "#d55e00")


def plot_error_breakdown(breakdown: ErrorBreakdown, class_names: Sequence[str], path: str | Path, title: str) -> None:
    """Draw what each kind costs, overall and in each class, into an image file (.png, .pdf, .svg).

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # here, because it takes a second to import

    figure = Figure(figsize=(9, 2.8 + 0.28 * len(class_names)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(7, 1 + len(class_names)))
    mean = breakdown.mean_gain()
    bars = above.barh(KINDS, [100 * mean[kind] for kind in KINDS], color=COLORS)
    above.bar_label(bars, fmt="%.1f", padding=3)
    above.invert_yaxis()
    above.margins(x=0.12)
    above.set_xlabel("points of AP50 gained by correcting this kind of error alone")
    above.set_title(title)
    points = 100 * np.stack([breakdown.gain[kind] for kind in KINDS], axis=1)
    below.imshow(points, aspect="auto", cmap="Oranges", vmin=0)
    below.set_xticks(range(len(KINDS)), KINDS)
    below.set_yticks(
        range(len(class_names)), [f"{n} ({100 * ap:.1f})" for n, ap in zip(class_names, breakdown.ap, strict=True)]
    )
    darkest = float(np.nanmax(points, initial=0.0))
    for row, values in enumerate(points):
        for column, value in enumerate(values):
            color = "white" if value > 0.6 * darkest else "black"
            text = "-" if np.isnan(value) else f"{value:.1f}"
            below.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    save_plot(figure, path, dpi=120)
