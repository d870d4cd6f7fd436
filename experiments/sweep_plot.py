"""Picture of a sweep of `frcnn benchmark`: the time of the detector's own parts, or images per second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from detector.errors import InputError
from experiments.benchmark import Case
from experiments.step_parts import NETWORK_PARTS

SUFFIXES: Final = (".png", ".pdf", ".svg")
COLUMNS: Final = 3


def check_suffix(path: str) -> None:
    """Raises:
    InputError: No kind of file that can be drawn; said before anything is measured."""
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f"--plot {path}: must end with {', '.join(SUFFIXES)}")


def plot_sweep(curves: Mapping[str, Sequence[Case]], sweep: str, unit: str, step: str, path: str) -> None:
    """Draw a picture for each curve: images per second, or the detector's own parts one on top of the other.

    Above the parts a dashed line shows growth in proportion to the number from the first point on.

    Args:
        curves: Cases by ascending number, under the title of each.
        sweep: What varies.
        unit: Of the numbers.
        step: What is timed.
        path: An image file (.png, .pdf, .svg); its folder is made.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # here, because it takes a second to import

    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.4 * rows + 1), layout="constrained")
    figure.suptitle(f"{step}, by the number of {unit}")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    draw = _rates if sweep == "batch_size" else _parts
    for place, (title, cases) in zip(axes, curves.items(), strict=False):
        draw(place, cases)
        place.set_title(title, fontsize=10)
        place.set_xlabel(unit)
        place.set_ylim(bottom=0)
    for empty in axes[len(curves) :]:
        empty.set_axis_off()
    found = {name: mark for place in axes for mark, name in zip(*place.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=2 * columns)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: cannot be written ({' '.join(str(error).split())})") from error


def _values(cases: Sequence[Case]) -> list[int]:
    return [case.value or 0 for case in cases]


def _rates(axes: Any, cases: Sequence[Case]) -> None:
    values, rates = _values(cases), [case.ours_per_s or 0.0 for case in cases]
    axes.plot(values, rates, "o-", color="C0", label="images per second")
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_ylabel("images per second")


def _parts(axes: Any, cases: Sequence[Case]) -> None:
    values = _values(cases)
    own = [part for part in cases[0].parts if part not in NETWORK_PARTS]
    times = [[_milliseconds(case, part) for case in cases] for part in own]
    axes.stackplot(values, times, labels=own, colors=[f"C{index}" for index in range(len(own))], alpha=0.6)
    totals = [case.detector_ms or 0.0 for case in cases]
    axes.plot(values, totals, "o-", color="black", clip_on=False, label="all of the detector's own parts")
    straight = [totals[0] * value / values[0] for value in values]
    axes.plot(values, straight, "--", color="grey", label="in proportion")
    axes.set_xlim(values[0], values[-1])
    axes.set_ylim(top=1.15 * max(totals))
    axes.set_ylabel("milliseconds")


def _milliseconds(case: Case, part: str) -> float:
    """Of a part; shares are of all parts, of which the detector's own take `detector_ms`."""
    own = sum(share for name, share in case.parts.items() if name not in NETWORK_PARTS)
    return (case.detector_ms or 0.0) * case.parts[part] / own
