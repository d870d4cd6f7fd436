"""Pictures of what `curves.py` returns, by matplotlib, which is imported late: it takes a second."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from detector.metrics.curves import BACKGROUND, MISSED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED: Final = 20  # curves in a legend
MOST_NUMBERED: Final = 30  # classes of a matrix whose cells hold numbers
TRUE_COLOR, FALSE_COLOR = "#0072b2", "#e69f00"


def curves_figure(documents: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draw the curves of runs side by side: precision and recall, recall over IoU, scores, reliability.

    Args:
        documents: By title, what `curves_of` returns; None for nan in them is fine.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 * len(documents), 8.5))
    places = {"left": 0.06, "right": 0.985, "bottom": 0.06, "top": 0.915, "wspace": 0.15, "hspace": 0.25}
    for part, (title, document) in zip(_columns(figure, len(documents)), documents.items(), strict=True):
        part.suptitle(title)
        panels = part.subplots(2, 2, gridspec_kw=places)  # found by matplotlib they would take half of all time
        _draw_precision(panels[0, 0], document)
        _draw_recall(panels[0, 1], document.get("proposal_recall"))
        _draw_scores(panels[1, 0], document["scores"])
        _draw_reliability(panels[1, 1], document["scores"])
    return figure


def confusion_figure(documents: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draw the confusion matrices of runs side by side, each row coloured by its shares; see `curves_figure`."""
    from matplotlib.figure import Figure

    most = max(len(document["class_names"]) for document in documents.values())
    side = min(max(5.5, 2.5 + 0.45 * (most + 1)), 16)
    figure = Figure(figsize=(side * len(documents), side), layout="constrained")
    for part, (title, document) in zip(_columns(figure, len(documents)), documents.items(), strict=True):
        part.suptitle(title)
        axes = part.subplots()
        counts, names = np.array(document["confusion"]), document["class_names"]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        small = {"fontsize": 9 if len(names) <= MOST_NUMBERED else 5}
        axes.set_xticks(range(len(counts)), [*names, MISSED], rotation=90, **small)
        axes.set_yticks(range(len(counts)), [*names, BACKGROUND], **small)
        axes.set_xlabel(f"detected as, with a score of {document['score_threshold']:g} or more")
        axes.set_ylabel("object (IoU 0.5)")
        for row, column in zip(*counts.nonzero(), strict=True) if len(names) <= MOST_NUMBERED else ():
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=color)
    return figure


def png(figure: "Figure", dpi: int) -> bytes:
    """Return a figure of matplotlib as the content of a PNG file."""
    buffer = io.BytesIO()
    save_figure(figure, buffer, dpi)
    return buffer.getvalue()


def save_figure(figure: "Figure", target: Any, dpi: int) -> None:
    """Write a figure, its texts as they are: between dollar signs, as names may have, matplotlib reads formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_text():  # numbers along axes are written when it is drawn
            text.set_parse_math(False)
    figure.savefig(target, dpi=dpi)


def _columns(figure: "Figure", number: int) -> list[Any]:
    return list(figure.subfigures(1, number, squeeze=False)[0])


def _draw_precision(axes: Any, document: Mapping[str, Any]) -> None:
    per_class = document["precision_recall"]
    known = {name: one for name, one in per_class.items() if one["objects"]}
    names = sorted(known, key=lambda name: -known[name]["ap"])
    for place, name in enumerate(names):
        index = document["class_names"].index(name)  # the same colour in every run
        color = f"C{index}" if len(per_class) <= 10 else _rainbow(index / (len(per_class) - 1))
        label = f"{name} {known[name]['ap']:.3f}" if place < MOST_NAMED else None
        columns = (np.array(known[name][key], float) for key in ("recall", "precision"))
        axes.plot(*columns, label=label, color=color, linewidth=1.2, marker=".", markersize=3)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title="precision and recall (AP50_voc)")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(fontsize=7, ncols=1 if len(names) <= 10 else 2, loc="lower left")


def _rainbow(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["turbo"](share)


def _draw_recall(axes: Any, recall: Mapping[str, Any] | None) -> None:
    axes.set(xlim=(0.5, 0.95), ylim=(0, 1.02), xlabel="IoU", ylabel="recall", title="recall of proposals over IoU")
    axes.grid(alpha=0.3)
    if recall is not None:
        for number, values in recall["recall"].items():
            axes.plot(recall["iou"], np.array(values, float), marker=".", label=f"best {number}")
        axes.legend(fontsize=8, loc="lower left")


def _draw_scores(axes: Any, scores: Mapping[str, Any]) -> None:
    edges = np.linspace(0, 1, len(scores["true"]) + 1)
    for name, color in (("false", FALSE_COLOR), ("true", TRUE_COLOR)):
        axes.stairs(scores[name], edges, label=f"{name}: {sum(scores[name])}", color=color, fill=True, alpha=0.6)
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter("{x:g}")  # powers of ten as formulas would take longer than all the rest
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="score", ylabel="detections", title="scores, right and wrong")
    axes.legend(fontsize=8, loc="upper right")


def _draw_reliability(axes: Any, scores: Mapping[str, Any]) -> None:
    precision, mean_score = (np.array(scores[key], float) for key in ("precision", "mean_score"))
    known, bins = np.isfinite(precision), len(precision)
    edges = np.linspace(0, 1, bins + 1)
    axes.bar(
        edges[:-1][known], precision[known], 1 / bins, align="edge", color=TRUE_COLOR, alpha=0.6, edgecolor="white"
    )
    axes.plot(mean_score[known], precision[known], ".", color="black", markersize=4)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    error = scores["calibration_error"]
    text = "reliability" if error is None or error != error else f"reliability (calibration error {error:.3f})"
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="score", ylabel="share that is right", title=text)
