"""`frcnn benchmark KIND`: each kind times, and prints a table or one JSON document."""

import sys

from experiments.benchmark.cases import Benchmark, print_benchmark
from experiments.benchmark.options import InferOptions, LoaderOptions, MetricsOptions, NetworkOptions, TrainOptions
from experiments.benchmark.processes import ProcessFailed


def benchmark(options: NetworkOptions | LoaderOptions | MetricsOptions) -> int:
    """Time what the options say; return the exit status, 1 if a process failed, after a line that says why."""
    try:
        print_benchmark(_measured(options), options.format)
    except ProcessFailed as error:
        print(f"frcnn benchmark {options.kind}: {error}", file=sys.stderr)
        return 1
    return 0


def _measured(options: NetworkOptions | LoaderOptions | MetricsOptions) -> Benchmark:
    if isinstance(options, LoaderOptions):
        from experiments.benchmark.loader import benchmark_data

        return benchmark_data(options)
    if isinstance(options, MetricsOptions):
        from experiments.benchmark.metrics import benchmark_evaluate

        return benchmark_evaluate(options)
    if isinstance(options, InferOptions) and options.detectors is not None:
        from experiments.benchmark.detectors import benchmark_detectors

        return benchmark_detectors(options.detectors, options)
    from experiments.benchmark.devices import benchmark_devices
    from experiments.benchmark.models import chosen_networks
    from experiments.benchmark.network import benchmark_network
    from experiments.benchmark.programs import chosen_setting
    from experiments.benchmark.sweep import benchmark_sweep

    if isinstance(options, TrainOptions) and options.callbacks:
        from experiments.benchmark.callbacks import benchmark_callbacks

        return benchmark_callbacks(options)
    networks = chosen_networks(options)
    setting = chosen_setting(options)
    if options.sweep is not None:
        return benchmark_sweep(networks, options.sweep, setting, options.plot)
    if isinstance(options, TrainOptions) and options.devices is not None:
        return benchmark_devices(networks, options.devices, setting)
    return benchmark_network(networks, setting, options.peer == "torchvision", not options.no_memory)
