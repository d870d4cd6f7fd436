"""The `frcnn` command."""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from detector.errors import InputError, TrainingError
from detector.kernels.threads import wait_politely
from experiments.arguments import Parser, cause_of, find_modules_here, names, numbers
from experiments.startup import quick_imports, run_process

HELP = """usage: frcnn COMMAND [OPTIONS]      (frcnn COMMAND --help shows all options)

Faster R-CNN on PASCAL VOC in PyTorch Lightning.

  fit        train:     frcnn fit --config experiments/mini_voc.yaml
  validate   evaluate a checkpoint on the validation splits
  test       evaluate a checkpoint on the test splits
  predict    detect objects in image files, and draw them
  evaluate   score any detector's result files against the annotations of splits
  ablate     train a grid of options and seeds:     frcnn ablate experiments/ablations/anchors_mini_voc.yaml
  anchors    audit anchors against the training annotations, and suggest better ones; needs no images
  show-data  draw augmented training images with their boxes into a contact sheet
  report     a grid or a folder of runs as one table, finished or not: frcnn report runs/anchors_mini_voc
  compare    two runs: options, metrics with intervals, classes, and the images on which they differ most
  benchmark  time this code beside a peer
  doctor     what is wrong with a dataset: frcnn doctor DATASET_DIR
  mini-voc   write a small synthetic dataset in VOC format
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on bad usage or bad input with one line on stderr, 1 (raised) on a failure."""
    if arguments is None:
        return run_process(lambda: main(sys.argv[1:]))
    find_modules_here()
    wait_politely()
    commands: dict[str, Callable[[list[str]], None]] = {
        "fit": lambda rest: _lightning("fit", rest),
        "validate": lambda rest: _lightning("validate", rest),
        "test": lambda rest: _lightning("test", rest),
        "predict": _predict,
        "evaluate": _evaluate,
        "anchors": _anchors,
        "show-data": _show_data,
        "ablate": _ablate,
        "report": _report,
        "compare": _compare,
        "benchmark": _benchmark,
        "doctor": _doctor,
        "mini-voc": _mini_voc,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        return _complain(f"{arguments[0]!r} is not a command of frcnn; there are {', '.join(commands)}")
    try:
        commands[arguments[0]](arguments[1:])
    except InputError as error:
        return _complain(_one_line(error), error.details)
    except TrainingError as error:
        _complain(_one_line(error))
        return 1
    return 0


def _quiet() -> None:
    """Keep advertising and warnings about Lightning's own inside away from the user."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _lightning(command: str, arguments: list[str]) -> None:
    with quick_imports():  # here, so that `frcnn --help` answers at once
        from pytorch_lightning.utilities.exceptions import SIGTERMException

        from experiments.lightning_cli import run_lightning

    _quiet()
    # Of a checkpoint's callbacks an evaluation needs none, and a training only what `BestCheckpoint` takes over.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    if command != "fit":
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
    try:
        with _one_line_of_the_parser(arguments):
            run_lightning([command, *arguments])
    except SIGTERMException:  # a SystemExit without a code, which would be taken for success
        sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _one_line_of_the_parser(arguments: list[str]) -> Iterator[None]:
    from jsonargparse import ArgumentError

    try:
        yield
    except ArgumentError as error:
        parts = [part for argument in arguments for part in argument.split("=", 1)]
        files = [value for option, value in pairwise(parts) if option in ("--config", "-c")]
        # A file that is no YAML is named by none of the parsers.
        raise InputError(cause_of(str(error)).replace("<unicode string>", " or ".join(files))) from None


def _anchors(arguments: list[str]) -> None:
    from experiments.anchors import print_audit

    _quiet()
    with _one_line_of_the_parser(arguments):
        print_audit(arguments)


def _show_data(arguments: list[str]) -> None:
    from experiments.show_data import show_data

    _quiet()
    with _one_line_of_the_parser(arguments):
        show_data(arguments)


def _ablate(arguments: list[str]) -> None:
    parser = Parser(
        "frcnn ablate",
        description="Train and evaluate every cell of a grid, each as its own process. The same command again skips "
        "what is done, goes on with what was interrupted, and tries again what failed. The launchers ray and slurm "
        "place whole cells; one training over several machines is frcnn fit with --trainer.num_nodes, started by "
        "torchrun or srun.",
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="what varies: see experiments/ablations")
    parser.add_argument("--runs_dir", default="runs", help="folder of all runs; the grid's is in it (runs)")
    parser.add_argument("--jobs", type=int, help="cells at the same time, which share the cores (1)")
    parser.add_argument(
        "--gpus", type=_gpus, metavar="0,1", help="one cell at a time on each; a GPU named twice runs two"
    )
    parser.add_argument("--gpus-per-run", type=int, default=1, help="GPUs of each cell (1)")
    parser.add_argument(
        "--launcher", choices=["local", "ray", "slurm"], default="local", help="what runs the cells (local)"
    )
    parser.add_argument("--ray-address", help="HOST:PORT of a running cluster, or auto; without it Ray starts here")
    parser.add_argument(
        "--slurm",
        type=_mapping,
        default={},
        metavar="{...}",
        help='of submitit: "{slurm_partition: gpu, timeout_min: 60}"; "{cluster: local}" tries it without SLURM',
    )
    parser.add_argument("--dry-run", action="store_true", help="check the grid, and print the commands of its cells")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(table)")
    options = parser.parse_args(arguments)
    from experiments.ablate import AblateOptions, ablate

    _quiet()
    code = ablate(AblateOptions(**vars(options)))
    if code:
        sys.exit(code)


def _gpus(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(re.fullmatch(r"[A-Za-z0-9/-]+", name) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GPUs, such as 0,1")
    return names


def _mapping(text: str) -> dict[str, object]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping, such as {{timeout_min: 60}}")
    return value


def _predict(arguments: list[str]) -> None:
    parser = Parser(
        "frcnn predict",
        description="Detect objects in images with a trained checkpoint. Images are read as in training, and upright "
        "where a camera stored them turned (EXIF): boxes refer to the upright image. Of an animation the first picture "
        "counts. An image that cannot be read is named and left out, and the exit status is then 1. No file is "
        "overwritten but those of an earlier prediction.",
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of frcnn fit; nothing else of the run is needed")
    parser.add_argument("--images", required=True, help="an image file, or a folder of them")
    parser.add_argument("--output", required=True, help="folder for one annotated image each, and predictions.json")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="draw detections from this score on (0.5)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time (1)")
    parser.add_argument("--accelerator", default="auto", help="as Lightning's: auto, cpu, gpu, ...")
    parser.add_argument("--precision", default="32-true", help="as Lightning's: 32-true, bf16-mixed, ..., or auto")
    parser.add_argument("--flip", action="store_true", help="also detect on the mirrored image, and merge")
    parser.add_argument(
        "--shortest_sides", type=numbers, metavar="[N, ...]", help='detect at several sizes, and merge: "[480, 600]"'
    )
    parser.add_argument(
        "--data.bit_depth",
        "--bit_depth",
        dest="bit_depth",
        type=int,
        help="bits of the values in 16-bit images (those of the training)",
    )
    _add_max_pixels(parser)
    options = parser.parse_args(arguments)
    with quick_imports():
        from pytorch_lightning.utilities.exceptions import SIGTERMException

        from experiments.predict import PredictOptions, predict

    _quiet()
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
    try:
        complete = predict(PredictOptions(**vars(options)))
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    if not complete:
        sys.exit(1)


def _evaluate(arguments: list[str]) -> None:
    parser = Parser(
        "frcnn evaluate",
        description="Score detections, of any detector, against the annotations of splits. Images are not needed.",
    )
    parser.add_argument(
        "predictions",
        nargs="+",
        metavar="PREDICTIONS",
        help="COCO results (JSON: file_name or image_id, category_name or category_id, bbox xywh, score), or a folder "
        "of the devkit's comp4_det_test_<class>.txt; several are evaluated one by one",
    )
    parser.add_argument("--data.root", dest="root", required=True, help="as for frcnn fit")
    parser.add_argument(
        "--data.val_splits", dest="val_splits", required=True, type=names, help='as for frcnn fit: "[2007_test]"'
    )
    parser.add_argument("--data.class_names", dest="class_names", type=names, help="names of labels 1, 2, ...")
    parser.add_argument(
        "--classes", type=names, metavar="[C, ...]", help="score these classes alone, as if there were no others (all)"
    )
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(table)")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="95 %% intervals from N resamples of the images")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    parser.add_argument(
        "--compare", metavar="OTHER", help="other detections on the same images: differences, by paired resamples"
    )
    parser.add_argument("--breakdown", action="store_true", help="AP50 lost to each kind of error, and in each class")
    parser.add_argument("--plot", metavar="FILE", help="draw the breakdown into a .png, .pdf or .svg")
    parser.add_argument(
        "--proposals", metavar="FILE", help="proposals as COCO results: adds their recall, which detections do not hold"
    )
    options = parser.parse_args(arguments)
    from experiments.evaluate import EvaluateOptions, evaluate

    evaluate(EvaluateOptions(**vars(options)))


def _report(arguments: list[str]) -> None:
    parser = Parser(
        "frcnn report",
        description="One row per cell of a grid, or per configuration of ordinary runs: metrics over seeds, "
        "differences to a baseline, anchors, speed. Works while runs are going on.",
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR", help="folder of a grid, or any folder that holds run folders")
    parser.add_argument(
        "--format", choices=["table", "json", "csv", "html"], help="(that of --output's suffix, else table)"
    )
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    parser.add_argument(
        "--metrics", type=names, default=["AP50_voc07"], metavar="[M, ...]", help='(AP50_voc07) such as "[AP, AP50]"'
    )
    parser.add_argument("--baseline", metavar="CELL", help="cell to compare with (the grid's own)")
    parser.add_argument(
        "--part", choices=["val", "test"], help="metrics of which data (test, if any finished run was tested)"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the images (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    options = parser.parse_args(arguments)
    from experiments.report import ReportOptions, report

    _quiet()
    report(ReportOptions(**vars(options)))


def _compare(arguments: list[str]) -> None:
    parser = Parser("frcnn compare", description="What differs between two runs: B - A.")
    parser.add_argument("run_a", metavar="RUN_A", help="run folder of frcnn fit")
    parser.add_argument("run_b", metavar="RUN_B", help="another one, evaluated on the same images")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(table)")
    parser.add_argument("--output", metavar="DIR", help="draw the images on which they differ most, into this folder")
    parser.add_argument("--images", type=int, default=8, help="how many of these images (8)")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="detections from this score on count (0.5)")
    parser.add_argument(
        "--part", choices=["val", "test"], help="metrics of which data (test, if both were tested, else val)"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the images (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    options = parser.parse_args(arguments)
    from experiments.compare import CompareOptions, compare

    _quiet()
    compare(CompareOptions(**vars(options)))


def _benchmark(arguments: list[str]) -> None:
    from experiments.benchmark_options import run_benchmark

    _quiet()
    with _one_line_of_the_parser(arguments):
        run_benchmark(arguments)


def _mini_voc(arguments: list[str]) -> None:
    parser = Parser("frcnn mini-voc", description="Write a small synthetic dataset in VOC format.")
    parser.add_argument("out_dir", help="folder to make; an existing equal one is kept")
    parser.add_argument(
        "--images", type=int, default=300, help="number of images (300): 60%% train, 20%% val, 20%% test"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (0)")
    options = parser.parse_args(arguments)
    from datamodules.mini_voc.writer import write_mini_voc

    folder = write_mini_voc(options.out_dir, options.images, options.seed)
    print(f"{options.images} images in {folder} (splits train, val, trainval, test)")


def _doctor(arguments: list[str]) -> None:
    parser = Parser(
        "frcnn doctor",
        description="Say what is wrong with a dataset in VOC format, what each problem does to a training, and what is "
        "in it. Exit status 1 if something would stop a training.",
    )
    parser.add_argument("root", metavar="DATASET_DIR", help="as --data.root of frcnn fit")
    for part in ("train", "val", "test"):
        parser.add_argument(
            f"--data.{part}_splits",
            dest=part,
            type=names,
            help="as for frcnn fit: examine only the splits that are given; without any of the three all files of the "
            "dataset, and which splits must not share images is told from their names (train, trainval, val, test)",
        )
    parser.add_argument("--data.class_names", dest="class_names", type=names, help="the known classes")
    parser.add_argument("--data.bit_depth", dest="bit_depth", type=int, default=16, help="as for frcnn fit (16)")
    _add_max_pixels(parser)
    parser.add_argument("--no-images", "--no_images", action="store_true", help="annotations alone")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(table)")
    parser.add_argument("--plot", metavar="FILE", help="draw classes, object sizes and aspect ratios: .png, .pdf, .svg")
    options = parser.parse_args(arguments)
    from pathlib import Path

    from datamodules.doctor.examine import DoctorOptions
    from datamodules.image_reading import Reading
    from experiments.doctor import Output, doctor

    splits = {part: given for part in ("train", "val", "test") if (given := getattr(options, part))}
    reading = Reading(options.bit_depth, options.max_pixels)
    healthy = doctor(
        DoctorOptions(Path(options.root), splits, options.class_names, not options.no_images, reading),
        Output(options.format, options.plot),
    )
    if not healthy:
        sys.exit(1)


def _add_max_pixels(parser: Parser) -> None:
    parser.add_argument(
        "--data.max_pixels",
        "--max_pixels",
        dest="max_pixels",
        type=int,
        default=178_956_970,
        help="images with more pixels are refused, before they are decoded (178956970)",
    )


def _one_line(error: BaseException) -> str:
    """The message of an input error; one from a data loader's worker comes wrapped in the worker's traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rsplit("InputError: ", 1)[-1]
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _complain(message: str, details: Iterable[str] = ()) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"frcnn: {message}", *details, sep="\n  ", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
