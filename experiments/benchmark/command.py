"""The options of `frcnn benchmark KIND`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, cast

from detector.errors import InputError
from experiments.arguments import Parser, names, numbers
from experiments.benchmark.cases import Benchmark, Case, print_benchmark


def run_benchmark(arguments: list[str]) -> None:
    """Run what a command line asks for, and print it as a table or one JSON document.

    Raises:
        InputError: Bad usage, or a value out of range.
        SystemExit: A process of the benchmark failed, with a line that says why.
    """
    from experiments.benchmark.processes import ProcessFailed

    parser = Parser("frcnn benchmark", description="Time this code beside a peer, in one run.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    train = kinds.add_parser("train", help="a training step, beside torchvision's detector")
    _add_network(train)
    _add_devices(train)
    _add_network(kinds.add_parser("infer", help="detection, beside torchvision's detector"))
    _add_data(kinds.add_parser("data", help="the training loader, beside VOCDetection with transforms.v2"))
    _add_evaluate(kinds.add_parser("evaluate", help="metrics, beside torchmetrics"))
    options = vars(parser.parse_args(arguments))
    style, kind = options.pop("format"), options.pop("kind")
    try:
        print_benchmark(_run(kind, options), style)
    except ProcessFailed as error:
        print(f"frcnn benchmark {kind}: {error}", file=sys.stderr)
        sys.exit(1)


def _run(kind: str, options: dict[str, Any]) -> Benchmark:
    if kind == "data":
        from experiments.benchmark.loader import benchmark_data

        return benchmark_data(**options)
    if kind == "evaluate":
        from experiments.benchmark.metrics import benchmark_evaluate

        return benchmark_evaluate(**options)
    return _run_network(kind, options)


def _run_network(kind: str, options: dict[str, Any]) -> Benchmark:
    from experiments.benchmark.models import chosen_networks
    from experiments.benchmark.programs import Kind

    networks = chosen_networks(*(options.pop(name) for name in ("networks", "config", "option", "size")))
    peer, memory, time_limit = (options.pop(name) for name in ("peer", "memory", "time_limit"))
    sweep, plot, devices = (options.pop(name, None) for name in ("sweep", "plot", "devices"))
    if plot is not None and sweep is None:
        raise InputError(f"--plot {plot}: is for --sweep")
    if sweep is not None and devices is not None:
        raise InputError("--sweep and --devices: give one of them")
    if time_limit <= 0:
        raise InputError(f"--time_limit {time_limit:g}: must be above 0")
    own = {name: value for name, value in options.items() if value is not None} | {"report": _progress}
    compared = sweep is None and devices is None
    own["precisions"] = _precisions(own.get("precisions"), ("32-true",) if not compared else None)
    if sweep is not None:
        from experiments.benchmark.sweep import benchmark_sweep

        return benchmark_sweep(cast(Kind, kind), networks, sweep, plot=plot, **own)
    if devices is not None:
        from experiments.benchmark.devices import benchmark_devices

        return benchmark_devices(networks, devices, time_limit=time_limit, **own)
    from experiments.benchmark.network import benchmark_network

    return benchmark_network(
        cast(Kind, kind), networks, peer=peer == "torchvision", memory=memory, time_limit=time_limit, **own
    )


def _precisions(given: Sequence[str] | None, default: Sequence[str] | None) -> Sequence[str]:
    """Those to time; without a default those that the device computes natively. Says what emulated ones cost."""
    from experiments.benchmark.programs import this_device
    from experiments.run.precision import native_precisions, say_cost

    device = this_device().type
    native = native_precisions(device)
    for precision in given or ():
        say_cost(precision, device, "auto", f"--precisions {native[-1]}")
    return given or default or native


def _progress(case: Case) -> None:
    """A case as soon as it is there; stdout is for the result."""
    ratio = "" if case.ratio is None else f", {case.ratio:.2f}x {case.peer}"
    print(f"{case.name}: {case.ours_ms:.0f} ms{ratio}", file=sys.stderr)


def _devices(text: str) -> list[int]:
    """Numbers as `frcnn ablate --gpus` takes them: 1,2."""
    try:
        return numbers(f"[{text.strip('[]')}]")
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of devices, such as 1,2") from None


def _add_network(parser: Parser) -> None:
    parser.add_argument(
        "--networks",
        type=names,
        metavar="[N, ...]",
        help="(all) of vgg16 and resnet50_fpn at 600x800 pixels, resnet18_fpn and mobilenet_v2_fpn at 320x416",
    )
    parser.add_argument("--config", help="the network of an experiment's file instead")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of --config: model.rpn.pre_nms_train=6000"
    )
    parser.add_argument(
        "--size", type=numbers, metavar="[H, W]", help="pixels of the images of --networks (each network's own)"
    )
    parser.add_argument(
        "--batch_sizes",
        type=numbers,
        metavar="[N, ...]",
        help="images ([1, 4]; of a sweep over them [1, 2, 4, 8], on a GPU up to 16, of other sweeps and --devices 1)",
    )
    parser.add_argument(
        "--precisions",
        type=names,
        metavar="[P, ...]",
        help="(32-true, and bf16-mixed or 16-mixed if the device computes it; with --sweep or --devices 32-true)",
    )
    parser.add_argument("--peer", choices=["torchvision", "none"], default="torchvision", help="(torchvision)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of all in turn; medians count (5)")
    parser.add_argument("--compile", action="store_true", help="compile ours; torchvision's stays as it is")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="do not measure the peak memory of a step as well"
    )
    parser.add_argument(
        "--time_limit", type=float, default=900, metavar="SECONDS", help="for processes started to measure (900)"
    )
    parser.add_argument(
        "--sweep",
        choices=["objects", "anchors", "batch_size"],
        help="instead: ours alone at 1 to 300 objects, 9 to 60 anchors per location, or several numbers of images",
    )
    parser.add_argument("--plot", metavar="F.png", help="draw the sweep into this file (.png, .pdf, .svg)")
    _add_format(parser)


def _add_devices(parser: Parser) -> None:
    parser.add_argument(
        "--devices",
        type=_devices,
        metavar="1,2",
        help="instead: ours alone on so many GPUs, or processes of one thread, with --batch_sizes images on each",
    )


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument("--images", type=int, default=4952, help="number of images (4952, as VOC2007 test)")
    parser.add_argument("--detections", type=int, default=100, help="per image (100)")
    parser.add_argument("--repeats", type=int, default=3, help="of our metrics; the peer runs once (3)")
    _add_format(parser)


def _add_data(parser: Parser) -> None:
    parser.add_argument("--data.root", dest="root", required=True, help="folder that holds VOC<year>/")
    parser.add_argument(
        "--data.train_splits", dest="train_splits", required=True, type=names, help='one split: "[2012_train]"'
    )
    parser.add_argument("--images", type=int, default=500, help="the first of the split (500)")
    parser.add_argument("--batch_size", type=int, default=4, help="images per batch (4)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each loader (2)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each, in turn (5)")
    _add_format(parser)


def _add_format(parser: Parser) -> None:
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(table)")
