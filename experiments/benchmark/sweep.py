"""`frcnn benchmark train|infer --sweep`: how time grows with the detector's own parts, and with the number of images.

The points of a sweep run in turn, round by round, in one process. Those of different anchors share backbone and box
head, and so do their weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final, Literal

from detector.anchors import AnchorConfig
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.measuring import device_name, median_parts_in_turn, median_times
from experiments.benchmark.models import OBJECTS, Batch, Network, build_network, make_images
from experiments.benchmark.network import case_name, our_case
from experiments.benchmark.programs import PACKAGES, Setting, our_program, ready
from experiments.benchmark.step_parts import NETWORK_PARTS, parts_program
from experiments.output import check_plot, save_plot

Sweep = Literal["objects", "anchors", "batch_size"]
NUMBERS_OF_OBJECTS: Final = (1, 3, 10, 30, 100, 300)
NUMBERS_OF_SCALES: Final = (3, 5, 10, 15, 20)
RATIOS: Final = (0.5, 1.0, 2.0)
UNITS: Final[dict[Sweep, str]] = {"objects": "objects", "anchors": "anchors per location", "batch_size": "images"}


@dataclass
class Point:
    """One number of what is swept, and what runs there."""

    value: int
    model: FasterRCNN
    batch: Batch


def benchmark_sweep(networks: Sequence[Network], sweep: Sweep, setting: Setting, plot: str | None = None) -> Benchmark:
    """Time steps of our detector at several numbers of objects, of anchors per location, or of images.

    The setting's numbers of images are those of the sweep over them, or else each gets a sweep.

    Raises:
        InputError: Objects in inference, or a file that cannot be written.
    """
    if setting.kind == "infer" and sweep == "objects":
        raise InputError("--sweep objects: is for train; inference is not told of objects")
    if plot is not None:
        check_plot(plot)
    over_images, by_number = sweep == "batch_size", f"by the number of {UNITS[sweep]}"
    title = f"{setting.step} in milliseconds, {by_number}; the parts' growth is that of the detector's own"
    benchmark = Benchmark(title, device_name(setting.device), PACKAGES, progress=True)
    curves: dict[str, list[Case]] = {}
    groups = [setting.batch_sizes] if over_images else [[number] for number in setting.batch_sizes]
    for network, group in product(networks, groups):
        points = _points(sweep, network, group, setting)
        for precision in setting.precisions:
            curve = curves[case_name(network, precision, None if over_images else group[0])] = []
            runs = [our_program(point.model, point.batch, precision, setting) for point in points]
            times = median_times(runs, setting.device, setting.repeats)
            in_parts = [parts_program(point.model, point.batch, precision, setting) for point in points]
            medians = median_parts_in_turn(in_parts, setting.repeats)
            for point, time, parts in zip(points, times, medians, strict=True):
                number = len(point.batch[0])
                varied = "" if over_images else f", {point.value} {UNITS[sweep]}"
                case = our_case(f"{case_name(network, precision, number)}{varied}", time, number, parts)
                curve.append(replace(case, value=point.value))
                benchmark.add(curve[-1])
    if plot is not None:
        plot_sweep(curves, UNITS[sweep], f"{setting.step}, {by_number}", plot, rates=over_images)
    benchmark.notes += [growth(title, cases, sweep) for title, cases in curves.items()]
    return benchmark


def _points(sweep: Sweep, network: Network, numbers: Sequence[int], setting: Setting) -> list[Point]:
    """Return the networks and images of all points."""

    def images(number: int, objects: int = OBJECTS) -> Batch:
        return make_images(network.size, number, objects, setting.device)

    if sweep != "anchors":
        model = ready(build_network(network, images(1))[0], setting)
        if sweep == "objects":
            return [Point(objects, model, images(numbers[0], objects)) for objects in NUMBERS_OF_OBJECTS]
        return [Point(number, model, images(number)) for number in numbers]
    batch = images(numbers[0])
    models: list[FasterRCNN] = []
    for scales in NUMBERS_OF_SCALES:
        model = build_network(replace(network, anchors=with_scales(network.anchors, scales)), batch)[0]
        if models:
            model.backbone, model.roi_heads.box_head = models[0].backbone, models[0].roi_heads.box_head
        models.append(model)
    return [Point(model.rpn.anchor_generator.anchors_per_location[0], ready(model, setting), batch) for model in models]


def with_scales(config: AnchorConfig, number: int) -> AnchorConfig:
    """Return the config with `RATIOS` and so many scales.

    Those of a pyramid go from the first of each level on up to twice of it, others from 32 to 512 pixels.
    """
    scales: list[Any]
    if isinstance(config.scales[0], list):
        octave = [2 ** (step / number) for step in range(number)]
        levels = range(len(config.scales))
        scales = [[config.of_level("scales", level)[0] * factor for factor in octave] for level in levels]
    else:
        scales = [32 * 16 ** (step / (number - 1)) / config.base_size for step in range(number)]
    return replace(config, scales=scales, aspect_ratios=list(RATIOS), sizes=None)


def growth(title: str, cases: Sequence[Case], sweep: Sweep) -> str:
    """Return in words what grew from the first to the last case: x times the objects, y times the time."""
    first, last = cases[0], cases[-1]
    assert first.value and last.value and first.detector_ms and last.detector_ms
    rate = f"{last.ours_per_s / first.ours_per_s:.2f} times the images per second"
    rates = f"{rate} ({first.ours_per_s:.3g} to {last.ours_per_s:.3g}), " if sweep == "batch_size" else ""
    return (
        f"{title}: {last.value / first.value:.3g} times the {UNITS[sweep]} ({first.value} to {last.value}): {rates}"
        f"{last.detector_ms / first.detector_ms:.2f} times the time of the detector's own parts "
        f"({first.detector_ms:.1f} to {last.detector_ms:.1f} ms)"
    )


def plot_sweep(curves: Mapping[str, Sequence[Case]], unit: str, title: str, path: str, rates: bool) -> None:
    """Draw a picture for each curve: images per second, or the detector's own parts one on top of the other.

    Above the parts a dashed line shows growth in proportion to the number from the first point on. The cases of a curve
    ascend by their number.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # here, because it takes a second to import

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.4 * rows + 1), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (name, cases) in zip(axes, curves.items(), strict=False):
        values = [case.value or 0 for case in cases]
        if rates:
            place.plot(values, [case.ours_per_s for case in cases], "o-", color="C0", label="images per second")
            place.set_xscale("log", base=2)
            place.set_xticks(values, [str(value) for value in values])
            place.set_ylabel("images per second")
        else:
            _draw_parts(place, values, cases)
        place.set_title(name, fontsize=10)
        place.set_xlabel(unit)
        place.set_ylim(bottom=0)
    for empty in axes[len(curves) :]:
        empty.set_axis_off()
    found = {name: mark for place in axes for mark, name in zip(*place.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=2 * columns)
    save_plot(figure, path, dpi=100)


def _draw_parts(axes: Any, values: list[int], cases: Sequence[Case]) -> None:
    own = [part for part in cases[0].parts if part not in NETWORK_PARTS]
    totals = [case.detector_ms or 0.0 for case in cases]
    # Shares are of all parts, of which the detector's own take `detector_ms`.
    units = [total / sum(case.parts[part] for part in own) for case, total in zip(cases, totals, strict=True)]
    times = [[case.parts[part] * unit for case, unit in zip(cases, units, strict=True)] for part in own]
    axes.stackplot(values, times, labels=own, colors=[f"C{index}" for index in range(len(own))], alpha=0.6)
    axes.plot(values, totals, "o-", color="black", clip_on=False, label="all of the detector's own parts")
    straight = [totals[0] * value / values[0] for value in values]
    axes.plot(values, straight, "--", color="grey", label="in proportion")
    axes.set_xlim(values[0], values[-1])
    axes.set_ylim(top=1.15 * max(totals))
    axes.set_ylabel("milliseconds")
