"""`frcnn benchmark KIND`: each kind times, and prints a table or one JSON document."""

import sys
from collections.abc import Sequence
from typing import Any

from experiments.benchmark.cases import Benchmark, Case, print_benchmark
from experiments.benchmark.loader import benchmark_data
from experiments.benchmark.metrics import benchmark_evaluate
from experiments.benchmark.options import InferOptions, LoaderOptions, MetricsOptions, TrainOptions
from experiments.benchmark.processes import ProcessFailed


def loader(options: LoaderOptions) -> None:
    """Time the training loader."""
    data, numbers = options.data, (options.images, options.batch_size, options.workers, options.repeats)
    print_benchmark(benchmark_data(data.root, data.train_splits or [], *numbers), options.format)


def metrics(options: MetricsOptions) -> None:
    """Time the metrics."""
    print_benchmark(benchmark_evaluate(options.images, options.detections, options.repeats), options.format)


def network(options: InferOptions) -> int:
    """Time training steps or detections; return the exit status, 1 if a process failed, after a line that says why."""
    try:
        print_benchmark(_network(options), options.format)
    except ProcessFailed as error:
        print(f"frcnn benchmark {options.kind}: {error}", file=sys.stderr)
        return 1
    return 0


def _network(options: InferOptions) -> Benchmark:
    from experiments.benchmark.devices import benchmark_devices
    from experiments.benchmark.models import chosen_networks
    from experiments.benchmark.network import benchmark_network
    from experiments.benchmark.sweep import benchmark_sweep

    networks = chosen_networks(options.networks, options.config, options.option, options.size)
    devices = options.devices if isinstance(options, TrainOptions) else None
    compared = options.sweep is None and devices is None
    own: dict[str, Any] = {"repeats": options.repeats, "compile": options.compile, "report": _progress}
    own["precisions"] = _precisions(options.precisions, None if compared else ("32-true",))
    if options.batch_sizes is not None:
        own["batch_sizes"] = options.batch_sizes
    if options.sweep is not None:
        return benchmark_sweep(options.kind, networks, options.sweep, plot=options.plot, **own)
    own["time_limit"] = options.time_limit
    if devices is not None:
        return benchmark_devices(networks, devices, **own)
    peer = options.peer == "torchvision"
    return benchmark_network(options.kind, networks, peer=peer, memory=not options.no_memory, **own)


def _precisions(given: Sequence[str] | None, default: Sequence[str] | None) -> Sequence[str]:
    """Return those to time, by default those that the device computes natively; say what emulated ones cost."""
    from experiments.benchmark.programs import this_device
    from experiments.run.precision import native_precisions, say_cost

    device = this_device().type
    native = native_precisions(device)
    for precision in given or ():
        say_cost(precision, device, "auto", f"--precisions {native[-1]}")
    return given or default or native


def _progress(case: Case) -> None:
    """Say a case as soon as it is there; stdout is for the result."""
    ratio = "" if case.ratio is None else f", {case.ratio:.2f}x {case.peer}"
    print(f"{case.name}: {case.ours_ms:.0f} ms{ratio}", file=sys.stderr)
