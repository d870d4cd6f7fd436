"""`frcnn benchmark train|infer`: a step of our detector beside one of torchvision's with the same network and weights.

Both get the same images, options and random weights, and run in turn in one process, so that whatever else the machine
does befalls both. Images have the size that the network sees, so none is resized. Ours are uint8, as they come from the
loader; torchvision's are floats in 0..1 already, as its reference scripts make them in the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from detector.faster_rcnn import FasterRCNN
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.memory import StepMemory
from experiments.benchmark.models import OBJECTS, Batch, NetworkOptions, build_network, make_images
from experiments.benchmark.programs import (
    Kind,
    Setting,
    autocast,
    check_numbers,
    device_name,
    our_optimizer,
    our_program,
    peer_program,
    ready,
    run_in_turn,
    this_device,
)
from experiments.benchmark.step_parts import NETWORK_PARTS, inference_parts, training_parts
from experiments.benchmark.torchvision_peer import NAME, build_peer


def benchmark_network(
    kind: Kind,
    networks: Sequence[tuple[str, NetworkOptions]],
    batch_sizes: Sequence[int] = (1, 4),
    precisions: Sequence[str] = ("32-true", "bf16-mixed"),
    peer: bool = True,
    repeats: int = 5,
    compile: bool = False,
    memory: bool = True,
    time_limit: float = 900,
    report: Callable[[Case], object] = lambda case: None,
) -> Benchmark:
    """Time our detector and torchvision's for each network, number of images and precision.

    A precision other than float32 is also compared with torchvision's float32, which is how its users run it.

    Args:
        kind: Training steps or inferences.
        networks: Name and options of each.
        batch_sizes: Images per step.
        precisions: As Lightning names them.
        peer: Whether torchvision's detector runs too.
        repeats: Timed rounds.
        compile: Whether ours is compiled.
        memory: Whether peak memory is measured too.
        time_limit: Seconds for each measurement of memory.
        report: Is told of each case as soon as it is measured.

    Raises:
        InputError: A number out of range, an unknown precision, or options that torchvision does not have.
    """
    check_numbers(batch_sizes, precisions, repeats)
    setting = Setting(kind, this_device(), repeats, compile)
    cases: list[Case] = []
    for name, options in networks:
        meter = StepMemory(options, setting, time_limit) if memory else None
        for number in batch_sizes:
            for case in _cases(name, options, number, precisions, peer, setting, meter):
                cases.append(case)
                report(case)
    title = "one training step" if kind == "train" else "one inference"
    return Benchmark(
        f"{title} in milliseconds, of networks with random weights on images of {OBJECTS} objects",
        device_name(setting.device),
        cases,
        ("torch", "torchvision", "numpy"),
    )


def _cases(
    name: str,
    options: NetworkOptions,
    number: int,
    precisions: Sequence[str],
    peer: bool,
    setting: Setting,
    meter: StepMemory | None,
) -> list[Case]:
    """Ours against torchvision's in the same precision, and against its float32."""
    batch = make_images(options.size, number, OBJECTS, setting.device)
    model, backbone = build_network(options, batch)
    other = build_peer(model, backbone).to(setting.device).train(setting.kind == "train") if peer else None
    model = ready(model, setting)
    if meter is not None:
        meter.measure(number, precisions, peer)
    ours = {precision: our_program(model, batch, precision, setting) for precision in precisions}
    theirs = {p: peer_program(other, batch, p, setting) for p in precisions} if other is not None else {}
    run_in_turn([*ours.values(), *theirs.values()], setting.device, setting.repeats)
    cases = []
    for precision in precisions:
        parts = _parts(model, batch, precision, setting)
        case = our_case(case_name(name, options, number, precision), median(ours[precision].times), number, parts)
        against = [other for other in dict.fromkeys((precision, "32-true")) if other in theirs]
        for other_precision in against:
            time = median(theirs[other_precision].times)
            peer_name = NAME if other_precision == precision else f"{NAME} in {other_precision}"
            beside = replace(case, peer=peer_name, peer_ms=time, peer_per_s=1000 * number / time)
            beside = beside if other_precision == against[0] else replace(beside, parts={})
            cases.append(beside if meter is None else meter.added(beside, number, precision, other_precision))
        if not against:
            cases.append(case if meter is None else meter.added(case, number, precision, None))
    return cases


def case_name(name: str, options: NetworkOptions, number: int, precision: str) -> str:
    """Such as "vgg16 600x800, batch 4, bf16-mixed"."""
    return f"{name} {options.size[0]}x{options.size[1]}, batch {number}, {precision}"


def our_case(name: str, milliseconds: float, number: int, parts: dict[str, float]) -> Case:
    """A step on `number` images in so many milliseconds, and its parts, in milliseconds too."""
    total = sum(parts.values())
    network = sum(parts.get(part, 0.0) for part in NETWORK_PARTS)
    return Case(
        name,
        milliseconds,
        None,
        {part: time / total for part, time in parts.items()},
        ours_per_s=1000 * number / milliseconds,
        times_the_limit=milliseconds / network,
        detector_ms=total - network,
    )


def _parts(model: FasterRCNN, batch: Batch, precision: str, setting: Setting) -> dict[str, float]:
    """Median milliseconds of each part."""
    run = parts_program(model, batch, precision, setting)
    run()
    return median_parts([run() for _ in range(min(3, setting.repeats))])


def parts_program(model: FasterRCNN, batch: Batch, precision: str, setting: Setting) -> Callable[[], dict[str, float]]:
    """A function that runs one step, or inference, in parts, and returns the milliseconds of each."""
    images, targets = batch
    context = autocast(precision, setting.device)
    if setting.kind == "infer":
        return lambda: inference_parts(model, images, context)
    optimizer = our_optimizer(model)
    return lambda: training_parts(model, images, targets, optimizer, context)


def median_parts(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median milliseconds of each part of several steps."""
    return {part: median(times[part] for times in measured) for part in measured[0]}
