"""Picture of an anchor audit: the objects at the resolution of training, with the anchors drawn into it."""

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.anchors.audit import AuditResult
from experiments.anchors.audited_data import AuditInput
from experiments.anchors.coverage import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"best IoU 0.5 or more": "#9ecae1", "best IoU below 0.5": "#fdae6b"}
ANCHOR, DEAD = "#1a1a1a", "#d62728"
BIN = 2**0.25


def audit_figure(given: AuditInput, result: AuditResult, title: str) -> "Figure":
    """Draw histograms of object sizes and aspect ratios, and both sides against each other, each with the anchors.

    Anchors that are dropped from half of the images or more, because they fit nowhere, are marked. Few objects far from
    all others do not stretch the axes: a line below says how many lie beyond.

    Args:
        given: The objects.
        result: The anchors.
        title: Above the whole picture.
    """
    from matplotlib.figure import Figure  # here, because it takes a second to import

    views = given.views()
    best = np.concatenate([view.best_ious(given.anchors, given.strides) for view in views])
    boxes = np.concatenate([view.boxes for view in views])
    width, height = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).T
    anchor_width, anchor_height = np.array([(anchor.width, anchor.height) for anchor in result.anchors]).T
    without = np.array([anchor.images_without for anchor in result.anchors])
    dead = (2 * without >= result.images) & (result.straddling == "drop")
    weight = np.full(len(boxes), 1 / len(views))
    figure = Figure(figsize=(15, 5.6), layout="constrained")
    sides, ratios, both = figure.subplots(1, 3)
    figure.suptitle(title)
    label = "square root of area in pixels, after resizing"
    _histogram(sides, label, np.sqrt(width * height), weight, best, np.sqrt(anchor_width * anchor_height), dead)
    _histogram(
        ratios, "aspect ratio (height / width)", height / width, weight, best, anchor_height / anchor_width, dead
    )
    edges = [_edges(width, anchor_width), _edges(height, anchor_height)]
    counts = np.histogram2d(width, height, edges, weights=weight)[0].T
    both.pcolormesh(*edges, np.ma.masked_equal(counts, 0), cmap="Blues", norm="log" if counts.any() else None)
    names = "anchor", "anchor that fits into half of the images at most"
    for rows, color, name in ((~dead, ANCHOR, names[0]), (dead, DEAD, names[1])):
        if rows.any():
            points = anchor_width[rows], anchor_height[rows]
            both.plot(*points, "X", color=color, markersize=11, markeredgecolor="white", label=name)
    both.set_xlabel("width in pixels, after resizing" + _left_out(weight, (width, edges[0]), (height, edges[1])))
    both.set_ylabel("height in pixels (the darker, the more objects)")
    for axis, set_scale in ((both.xaxis, both.set_xscale), (both.yaxis, both.set_yscale)):
        _logarithmic(axis, set_scale)
    handles = [handle for axes in (sides, both) for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _histogram(axes: Any, label: str, values: Array, weight: Array, best: Array, anchors: Array, dead: Array) -> None:
    """Draw objects by a positive quantity, and a line at each anchor, in the colour of dead ones where all are dead."""
    bins = _edges(values, anchors)
    axes.set_xlabel(label + _left_out(weight, (values, bins)))
    groups = best >= 0.5, best < 0.5
    axes.hist(
        [values[rows] for rows in groups],
        bins,
        weights=[weight[rows] for rows in groups],
        stacked=True,
        color=list(COLORS.values()),
        label=list(COLORS),
    )
    axes.margins(x=0, y=0.12)
    axes.set_ylabel("objects")
    _logarithmic(axes.xaxis, axes.set_xscale)
    distinct, group = np.unique(anchors.round(3), return_inverse=True)
    for index, value in enumerate(distinct.tolist()):
        color = DEAD if dead[group == index].all() else ANCHOR
        axes.axvline(value, color=color, linestyle="--", linewidth=1.2)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        axes.annotate(f"{value:.3g}", (value, 1), (3, -4), color=color, **place)


def _edges(values: Array, anchors: Array) -> Array:
    """Return the edges of bins of equal ratio for objects' values, and for those of anchors, all of which they hold.

    They end an octave beyond the middle 99% of the objects where these go on further.
    """
    if len(values):
        low = max(values.min(), np.percentile(values, 0.5, method="higher") / 2)
        high = min(values.max(), np.percentile(values, 99.5, method="lower") * 2)
        anchors = np.append(anchors, (low, high))
    first, last = np.log((anchors.min(), anchors.max())) / np.log(BIN)
    edges: Array = BIN ** np.arange(np.floor(first), np.ceil(last) + 1.5)
    return edges


def _left_out(weight: Array, *axes: tuple[Array, Array]) -> str:
    """Return a line about the objects that lie beyond an axis, each given as values and edges, if there are any."""
    hidden = np.any([(values < edges[0]) | (values > edges[-1]) for values, edges in axes], axis=0)
    if not hidden.any():
        return ""
    line = f"\nnot shown: {np.ceil(weight[hidden].sum()):,.0f} of {weight.sum():,.0f} objects, beyond the axes"
    found = axes[0][0][hidden]
    return line if len(axes) > 1 else f"{line} ({found.min():.3g} to {found.max():.3g})"


def _logarithmic(axis: Any, set_scale: Any) -> None:
    """Label an axis by powers of two as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    set_scale("log", base=2)
    axis.set_major_locator(LogLocator(base=2))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
