"""`frcnn benchmark train|infer`: a step of our detector beside one of torchvision's with the same network and weights.

Both get the same images, options and random weights, and run in turn in one process, so that whatever else the machine
does befalls both. Images have the size that the network sees, so none is resized. Ours are uint8, as they come from the
loader; torchvision's are floats in 0..1 already, as its reference scripts make them in the loader.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.measuring import Parts, device_name, median_parts_in_turn, median_times, shares
from experiments.benchmark.memory import StepMemory
from experiments.benchmark.models import OBJECTS, Network, build_network, make_images
from experiments.benchmark.programs import PACKAGES, Setting, our_program, peer_program, ready
from experiments.benchmark.step_parts import NETWORK_PARTS, parts_program
from experiments.benchmark.torchvision_peer import NAME, build_peer, peer_batch


def benchmark_network(networks: Sequence[Network], setting: Setting, peer: bool, memory: bool) -> Benchmark:
    """Time our detector and torchvision's for each network, number of images and precision.

    A precision other than float32 is also compared with torchvision's float32, which is how its users run it.

    Raises:
        InputError: Options that torchvision does not have.
        ProcessFailed: A process that measures memory failed.
    """
    title = f"{setting.step} in milliseconds, of networks with random weights on images of {OBJECTS} objects"
    benchmark = Benchmark(title, device_name(setting.device), PACKAGES, progress=True)
    for network in networks:
        meter = StepMemory(network, setting) if memory else None
        for number in setting.batch_sizes:
            for case in _cases(network, number, peer, setting, meter):
                benchmark.add(case)
    return benchmark


def _cases(network: Network, number: int, peer: bool, setting: Setting, meter: StepMemory | None) -> Iterator[Case]:
    """Yield ours against torchvision's in the same precision, and against its float32."""
    batch = make_images(network.size, number, OBJECTS, setting.device)
    model, backbone = build_network(network, batch)
    other = build_peer(model, backbone) if peer else None
    model = ready(model, setting)
    if meter is not None:
        meter.measure(number, peer)
    runs = {(False, precision): our_program(model, batch, precision, setting) for precision in setting.precisions}
    if other is not None:
        theirs = peer_batch(batch)
        runs |= {(True, precision): peer_program(other, theirs, precision, setting) for precision in setting.precisions}
    times = dict(zip(runs, median_times(list(runs.values()), setting.device, setting.repeats), strict=True))
    for precision in setting.precisions:
        run = parts_program(model, batch, precision, setting)
        (parts,) = median_parts_in_turn([run], min(3, setting.repeats))
        case = our_case(case_name(network, precision, number), times[False, precision], number, parts)
        against = [of_peer for of_peer in dict.fromkeys((precision, "32-true")) if (True, of_peer) in times]
        for of_peer in against or (None,):
            beside = case if of_peer in (None, precision) else replace(case, parts={})
            if meter is not None:
                peak, per_image = meter.figures(number, precision, peer=False)
                beside = replace(beside, ours_peak_mb=peak, mb_per_image=per_image)
            if of_peer is not None:
                named = NAME if of_peer == precision else f"{NAME} in {of_peer}"
                beside = replace(beside, peer=named, peer_ms=times[True, of_peer])
            if of_peer is not None and meter is not None:
                peak, per_image = meter.figures(number, of_peer, peer=True)
                beside = replace(beside, peer_peak_mb=peak, peer_mb_per_image=per_image)
            yield beside


def case_name(network: Network, precision: str, number: int | None = None) -> str:
    """Return such as "vgg16 600x800, batch 4, bf16-mixed", without the batch where it has no number."""
    batch = "" if number is None else f"batch {number}, "
    return f"{network.name} {network.size[0]}x{network.size[1]}, {batch}{precision}"


def our_case(name: str, milliseconds: float, number: int, parts: Parts) -> Case:
    """Return the case of a step on `number` images in so many milliseconds, and its parts, in milliseconds too."""
    network = sum(parts.get(part, 0.0) for part in NETWORK_PARTS)
    return Case(
        name,
        milliseconds,
        parts=shares(parts),
        number=number,
        times_the_limit=milliseconds / network,
        detector_ms=sum(parts.values()) - network,
    )
