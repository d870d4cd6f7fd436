"""`frcnn benchmark infer --detectors`: trained detectors and what was exported of them, in turn on the same images."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import detector
from detector.errors import InputError
from detector.files import program_of
from detector.use.exported import ExportedDetector
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.measuring import device_name, median_times, this_device
from experiments.benchmark.models import OBJECTS, SMALLEST, make_images
from experiments.benchmark.options import NetworkOptions
from experiments.benchmark.programs import PACKAGES
from experiments.run.host_memory import keep_freed_memory


def benchmark_detectors(paths: Sequence[str], options: NetworkOptions) -> Benchmark:
    """Time detectors, from images to detections; the first is what the others are compared with.

    Args:
        paths: What `detector.load` takes.
        options: Numbers and size of the images, and of rounds.

    Raises:
        InputError: One is no detector, or the images would be too small.
    """
    device = "cpu" if any(program_of(path) is not None for path in paths) else this_device().type
    trained = [detector.load(path, device) for path in paths]
    networks = [one.network for one in trained]
    keep_freed_memory(trained[0].device)
    first = networks[0].image_config if isinstance(networks[0], ExportedDetector) else networks[0].model.image_config
    shortest = first.shortest_side[-1]
    height, width = options.size or (shortest, min(shortest * 4 // 3, first.longest_side))
    if min(height, width) < SMALLEST:
        raise InputError(f"--size {[height, width]}: must be [height, width] of at least {SMALLEST} pixels each")
    packages = (*PACKAGES, "onnxruntime", "openvino")
    title = "one inference in milliseconds, in float32, from images to detections"
    benchmark = Benchmark(title, device_name(trained[0].device), packages, progress=True)
    for number in options.batch_sizes or (1, 4):
        images, _ = make_images((height, width), number, OBJECTS, trained[0].device)
        runs = [partial(one.detect, images) for one in trained]
        times = median_times(runs, trained[0].device, options.repeats)
        for path, time in zip(paths, times, strict=True):
            case = Case(f"{path} {height}x{width}, batch {number}", time, number=number)
            benchmark.add(case if path == paths[0] else replace(case, peer=paths[0], peer_ms=times[0]))
    return benchmark
