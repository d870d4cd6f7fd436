"""`frcnn doctor`: print, as a table or as JSON, what is wrong with a dataset and what is in it; and draw the latter."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from datamodules.doctor.examine import DoctorOptions, Report, examine
from datamodules.problems import KINDS
from detector.errors import printable
from detector.use.reading import Reading
from experiments.dataset.formats import dataset_format, made_splits
from experiments.dataset.options import CheckDatasetOptions
from experiments.output import json_text, percent, save_plot

LISTED = 100  # problems in the table; JSON holds them all
SHOWN_CLASSES = 40  # in the picture
SIZE_EDGES = (0, 8, 16, 32, 64, 128, 256, 512, 1024, float("inf"))
RATIO_EDGES = (0, 0.177, 0.25, 0.354, 0.5, 0.707, 1, 1.414, 2, 2.828, 4, 5.657, float("inf"))


def doctor(options: CheckDatasetOptions) -> int:
    """Examine a dataset and print the report.

    Returns:
        The exit status: 1 if something in it would stop a training.

    Raises:
        InputError: No dataset there, a split that does not exist, a plot that cannot be written.
    """
    data = options.data
    given = {"train": data.train_splits, "val": data.val_splits, "test": data.test_splits}
    splits = {part: names for part, names in given.items() if names}
    reading = Reading(16 if data.bit_depth is None else data.bit_depth, data.max_pixels)
    format = dataset_format(options.data_format, options.root, data.image_dirs, reading)
    made = made_splits(format, data)
    examined = DoctorOptions(format, splits, data.class_names, not options.no_images, made)
    report = examine(examined)
    if made is not None:
        made.keep()
    if options.plot is not None:
        plot_report(report, options.plot, options.root)
    if options.format == "json":
        print(json_text(document_of(report, examined)))
    else:
        _print_report(report, examined)
    return any(problem.breaks for problem in report.problems)


def document_of(report: Report, options: DoctorOptions) -> dict[str, Any]:
    """Return the JSON document.

    Histograms count usable objects; their last edge, null, stands for infinity.
    """
    sizes, ratios = _sizes_and_ratios(report)
    kinds = Counter(problem.kind for problem in report.problems)
    return {
        "dataset": str(options.format.root),
        "images": report.images,
        "objects": report.objects,
        "difficult": sum(report.difficult.values()),
        "classes": report.classes,
        "difficult_by_class": report.difficult,
        "images_by_class": report.class_images,
        "image_files": report.image_files,
        "images_without_objects": report.empty,
        "splits": report.splits,
        "object_size": _histogram(sizes, SIZE_EDGES),
        "aspect_ratio": _histogram(ratios, RATIO_EDGES),
        "breaks_training": sum(problem.breaks for problem in report.problems),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "problems": [problem.document for problem in report.problems],
    }


def _sizes_and_ratios(report: Report) -> tuple[np.ndarray, np.ndarray]:
    """Square roots of areas in pixels, and height / width."""
    width, height = (report.boxes[:, 2:] - report.boxes[:, :2]).T
    return np.sqrt(width * height), height / width


def _histogram(values: np.ndarray, edges: Iterable[float]) -> dict[str, list[Any]]:
    edges = list(edges)
    counts, _ = np.histogram(values, edges)
    return {"edges": [edge if np.isfinite(edge) else None for edge in edges], "counts": counts.tolist()}


def _print_report(report: Report, options: DoctorOptions) -> None:
    console = Console(highlight=False)
    _say(
        console,
        f"{options.format.root}: {report.images} images ({report.empty} without objects), {report.objects} objects "
        f"({sum(report.difficult.values())} difficult), {len(report.classes)} classes",
    )
    if report.splits:
        _say(console, "splits: " + ", ".join(f"{name} {count}" for name, count in report.splits.items()))
    console.print(_class_table(report))
    if not report.problems:
        _say(console, "no problems")
        return
    console.print(_kind_table(report))
    ordered = sorted(report.problems, key=lambda problem: not problem.breaks)
    for problem in ordered[:LISTED]:
        _say(console, f"{problem.kind}: {problem.message}")
    if len(ordered) > LISTED:
        _say(console, f"... and {len(ordered) - LISTED} more; --format json lists all")
    stops = sum(problem.breaks for problem in ordered)
    _say(console, f"{stops} of {len(ordered)} problems would stop a training" if stops else "nothing stops a training")


def _say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, soft_wrap=True)


def _class_table(report: Report) -> Table:
    table = Table("class", *(Column(name, justify="right") for name in ("objects", "share", "difficult", "images")))
    for name, count in sorted(report.classes.items(), key=lambda item: -item[1]):
        share = percent(count / max(report.objects, 1), ".1f")
        table.add_row(escape(name), str(count), share, str(report.difficult[name]), str(report.class_images[name]))
    return table


def _kind_table(report: Report) -> Table:
    table = Table("problem", Column("number", justify="right"), "effect in training")
    counts = Counter((KINDS.index(problem.kind), not problem.breaks, problem.effect) for problem in report.problems)
    for (kind, harmless, effect), count in sorted(counts.items()):
        table.add_row(KINDS[kind], str(count), effect, style=None if harmless else "bold")
    return table


def plot_report(report: Report, path: str | Path, title: str) -> None:
    """Draw objects by class, and histograms of the sizes and the aspect ratios of objects.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # here, because it takes a second to import

    classes = sorted(report.classes.items(), key=lambda item: item[1], reverse=True)
    shown = classes[:SHOWN_CLASSES]
    figure = Figure(figsize=(11, max(4.5, 1.6 + 0.24 * len(shown))), layout="constrained")
    figure.suptitle(f"{title}: {report.objects} objects in {report.images} images")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1))
    axes = figure.add_subplot(grid[:, 0])
    names = [name for name, _ in shown]
    difficult = [report.difficult[name] for name in names]
    easy = [count - report.difficult[name] for name, count in shown]
    axes.barh(range(len(names)), easy, color="tab:blue", label="not difficult")
    bars = axes.barh(range(len(names)), difficult, left=easy, color="tab:orange", label="difficult")
    axes.bar_label(bars, [str(count) for _, count in shown], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.12 * max([1, *(count for _, count in shown)]))
    axes.legend(loc="lower right")
    axes.set_xlabel("objects")
    more = len(classes) - len(shown)
    axes.set_title(f"{len(shown)} most frequent classes of {len(classes)}" if more else "class balance")
    sizes, ratios = _sizes_and_ratios(report)
    _draw_histogram(figure.add_subplot(grid[0, 1]), sizes, SIZE_EDGES, "object size: square root of its area in pixels")
    _draw_histogram(figure.add_subplot(grid[1, 1]), ratios, RATIO_EDGES, "aspect ratio: height / width")
    save_plot(figure, path, dpi=120)


def _draw_histogram(axes: Any, values: np.ndarray, edges: Sequence[float], label: str) -> None:
    counts, _ = np.histogram(values, edges)
    share = 100 * counts / max(len(values), 1)
    bars = axes.bar(np.arange(len(counts)) + 0.5, share, width=0.95, color="tab:blue")
    axes.bar_label(bars, [f"{value:.0f} %" if value >= 0.5 else "" for value in share], fontsize=8)
    axes.set_xticks(range(len(edges)), [_tick(edge) for edge in edges])
    axes.margins(y=0.12)
    axes.set_xlabel(label)
    axes.set_ylabel("% of objects")


def _tick(edge: float) -> str:
    if not np.isfinite(edge):
        return "∞"
    return f"{edge:.2g}" if edge < 10 else f"{edge:.0f}"
