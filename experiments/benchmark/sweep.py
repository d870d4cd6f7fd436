"""`frcnn benchmark train|infer --sweep`: how the time of the detector's own parts grows, and images per second with the
number of images.

The points of a sweep run in turn, round by round, in one process. Those of different anchors share backbone and box
head, and so do their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final, Literal

from detector.anchors import AnchorConfig
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.models import OBJECTS, Batch, NetworkOptions, build_network, make_images
from experiments.benchmark.network import case_name, median_parts, our_case, parts_program
from experiments.benchmark.programs import (
    Kind,
    Setting,
    check_numbers,
    device_name,
    our_program,
    ready,
    run_in_turn,
    this_device,
)
from experiments.benchmark.step_parts import NETWORK_PARTS
from experiments.output import check_plot, save_plot

Sweep = Literal["objects", "anchors", "batch_size"]
NUMBERS_OF_OBJECTS: Final = (1, 3, 10, 30, 100, 300)
NUMBERS_OF_SCALES: Final = (3, 5, 10, 15, 20)
RATIOS: Final = (0.5, 1.0, 2.0)
BATCH_SIZES: Final = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16)}
UNITS: Final[dict[Sweep, str]] = {"objects": "objects", "anchors": "anchors per location", "batch_size": "images"}


@dataclass
class Point:
    """One number of what is swept, and what runs there."""

    value: int
    model: FasterRCNN
    batch: Batch


def benchmark_sweep(
    kind: Kind,
    networks: Sequence[tuple[str, NetworkOptions]],
    sweep: Sweep,
    batch_sizes: Sequence[int] | None = None,
    precisions: Sequence[str] = ("32-true",),
    repeats: int = 5,
    compile: bool = False,
    plot: str | None = None,
    report: Callable[[Case], object] = lambda case: None,
) -> Benchmark:
    """Time steps of our detector at several numbers of objects, of anchors per location, or of images.

    Args:
        kind: Training steps or inferences.
        networks: Name and options of each.
        sweep: What varies.
        batch_sizes: Images per step: those of the sweep over them, or else each gets a sweep of its own (one image).
        precisions: As Lightning names them.
        repeats: Timed rounds.
        compile: Whether ours is compiled.
        plot: An image file (.png, .pdf, .svg) to draw.
        report: Is told of each case as soon as it is measured.

    Raises:
        InputError: A number out of range, an unknown precision, objects in inference, or a file that cannot be written.
    """
    device = this_device()
    sizes = tuple(batch_sizes or (BATCH_SIZES[device.type] if sweep == "batch_size" else (1,)))
    check_numbers(sizes, precisions, repeats)
    if kind == "infer" and sweep == "objects":
        raise InputError("--sweep objects: is for train; inference is not told of objects")
    if plot is not None:
        check_plot(plot)
    setting = Setting(kind, device, repeats, compile)
    curves: dict[str, list[Case]] = {}
    for name, options in networks:
        for group in [sizes] if sweep == "batch_size" else [(number,) for number in sizes]:
            points = _points(sweep, options, group, setting)
            for precision in precisions:
                cases = _run(sweep, points, (name, options, group[0], precision), setting)
                title = case_name(name, options, group[0], precision)
                curves[title if sweep != "batch_size" else f"{name} {_size(options)}, {precision}"] = cases
                for case in cases:
                    report(case)
    step = "one training step" if kind == "train" else "one inference"
    title = f"{step} in milliseconds, by the number of {UNITS[sweep]}; the parts' growth is that of the detector's own"
    if plot is not None:
        plot_sweep(curves, sweep, UNITS[sweep], step, plot)
    notes = [growth(title, cases, sweep) for title, cases in curves.items()]
    cases = [case for curve in curves.values() for case in curve]
    return Benchmark(title, device_name(device), cases, ("torch", "torchvision", "numpy"), notes)


def _size(options: NetworkOptions) -> str:
    return f"{options.size[0]}x{options.size[1]}"


def _points(sweep: Sweep, options: NetworkOptions, numbers: Sequence[int], setting: Setting) -> list[Point]:
    """Networks and images of all points."""

    def images(number: int, objects: int = OBJECTS) -> Batch:
        return make_images(options.size, number, objects, setting.device)

    if sweep == "anchors":
        return _anchor_points(options, images(numbers[0]), setting)
    first = images(1)
    model = ready(build_network(options, first)[0], setting)
    if sweep == "objects":
        return [Point(objects, model, images(numbers[0], objects)) for objects in NUMBERS_OF_OBJECTS]
    return [Point(number, model, images(number)) for number in numbers]


def _anchor_points(options: NetworkOptions, batch: Batch, setting: Setting) -> list[Point]:
    models: list[FasterRCNN] = []
    for scales in NUMBERS_OF_SCALES:
        anchors = with_scales(options.anchors, scales)
        model = build_network(replace(options, anchors=anchors), batch)[0]
        if models:
            model.backbone, model.roi_heads.box_head = models[0].backbone, models[0].roi_heads.box_head
        models.append(model)
    return [Point(model.rpn.anchor_generator.anchors_per_location, ready(model, setting), batch) for model in models]


def with_scales(config: AnchorConfig, number: int) -> AnchorConfig:
    """The config with `RATIOS` and so many scales: of a pyramid, from the first of each level on up to twice of it,
    otherwise 32 to 512 pixels."""
    scales: list[Any]
    if isinstance(config.scales[0], list):
        octave = [2 ** (step / number) for step in range(number)]
        levels = range(len(config.scales))
        scales = [[config.scales_of_level(level)[0] * factor for factor in octave] for level in levels]
    else:
        scales = [32 * 16 ** (step / (number - 1)) / config.base_size for step in range(number)]
    return replace(config, scales=scales, aspect_ratios=list(RATIOS))


def _run(
    sweep: Sweep, points: Sequence[Point], case: tuple[str, NetworkOptions, int, str], setting: Setting
) -> list[Case]:
    """The cases of one network, size and precision."""
    name, options, number, precision = case
    programs = [our_program(point.model, point.batch, precision, setting) for point in points]
    run_in_turn(programs, setting.device, setting.repeats)
    in_parts = [parts_program(point.model, point.batch, precision, setting) for point in points]
    measured: list[list[dict[str, float]]] = [[] for _ in points]
    for round in range(setting.repeats + 1):
        for run, times in zip(in_parts, measured, strict=True):
            milliseconds = run()
            if round > 0:  # the first is warm-up
                times.append(milliseconds)
    cases = []
    for point, program, times in zip(points, programs, measured, strict=True):
        images = point.value if sweep == "batch_size" else number
        title = case_name(name, options, images, precision)
        title = title if sweep == "batch_size" else f"{title}, {point.value} {UNITS[sweep]}"
        result = our_case(title, median(program.times), images, median_parts(times))
        cases.append(replace(result, value=point.value))
    return cases


def growth(title: str, cases: Sequence[Case], sweep: Sweep) -> str:
    """From the first to the last case in words: x times the objects, y times the time."""
    first, last = cases[0], cases[-1]
    assert first.value and last.value and first.detector_ms and last.detector_ms
    assert first.ours_per_s and last.ours_per_s
    more = f"{title}: {last.value / first.value:.3g} times the {UNITS[sweep]} ({first.value} to {last.value})"
    own = (
        f"{last.detector_ms / first.detector_ms:.2f} times the time of the detector's own parts "
        f"({first.detector_ms:.1f} to {last.detector_ms:.1f} ms)"
    )
    if sweep != "batch_size":
        return f"{more}: {own}"
    rate = f"{last.ours_per_s / first.ours_per_s:.2f} times the images per second"
    return f"{more}: {rate} ({first.ours_per_s:.3g} to {last.ours_per_s:.3g}), {own}"


COLUMNS: Final = 3


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
    save_plot(figure, path, dpi=100)


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
