"""The options of `frcnn benchmark KIND`."""

import sys
from typing import Any, cast

from experiments.arguments import Parser, names, numbers
from experiments.benchmark import Benchmark, Case, print_benchmark


def run_benchmark(arguments: list[str]) -> None:
    """Run what a command line asks for, and print it as a table or one JSON document.

    Raises:
        InputError: Bad usage, or a value out of range.
    """
    parser = Parser("frcnn benchmark", description="Time this code beside a peer, in one run.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    _add_network(kinds.add_parser("train", help="a training step, beside torchvision's detector"))
    _add_network(kinds.add_parser("infer", help="detection, beside torchvision's detector"))
    _add_data(kinds.add_parser("data", help="the training loader, beside VOCDetection with transforms.v2"))
    _add_evaluate(kinds.add_parser("evaluate", help="metrics, beside torchmetrics"))
    options = vars(parser.parse_args(arguments))
    style, kind = options.pop("format"), options.pop("kind")
    print_benchmark(_run(kind, options), style)


def _run(kind: str, options: dict[str, Any]) -> Benchmark:
    if kind == "data":
        from experiments.benchmark_data import benchmark_data

        return benchmark_data(**options)
    if kind == "evaluate":
        from experiments.benchmark_evaluate import benchmark_evaluate

        return benchmark_evaluate(**options)
    from experiments.benchmark_network import Kind, benchmark_network, chosen_networks

    chosen = chosen_networks(options.pop("networks"), options.pop("config"), options.pop("option"))
    options["peer"] = options["peer"] == "torchvision"
    return benchmark_network(cast(Kind, kind), chosen, report=_progress, **options)


def _progress(case: Case) -> None:
    """A case as soon as it is there; stdout is for the result."""
    ratio = "" if case.ratio is None else f", {case.ratio:.2f}x {case.peer}"
    print(f"{case.name}: {case.ours_ms:.0f} ms{ratio}", file=sys.stderr)


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
    parser.add_argument("--batch_sizes", type=numbers, default=[1, 4], metavar="[N, ...]", help="images ([1, 4])")
    parser.add_argument(
        "--precisions", type=names, default=["32-true", "bf16-mixed"], metavar="[P, ...]", help="32-true, bf16-mixed"
    )
    parser.add_argument("--peer", choices=["torchvision", "none"], default="torchvision", help="(torchvision)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of all in turn; medians count (5)")
    parser.add_argument("--compile", action="store_true", help="compile ours; torchvision's stays as it is")
    _add_format(parser)


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
