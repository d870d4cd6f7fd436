"""The `frcnn` command."""

import os
import re
import sys
from collections.abc import Callable, Iterable

from detector.errors import InputError, TrainingError
from detector.kernels.threads import wait_politely
from experiments.ablation.command import ablate_command
from experiments.arguments import find_modules_here, one_line_of_the_parser, quiet
from experiments.dataset.command import doctor_command, mini_voc_command
from experiments.report.command import report_command
from experiments.results.command import compare_command, evaluate_command
from experiments.run.command import lightning_command, predict_command
from experiments.run.startup import run_process

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
        "fit": lambda rest: lightning_command("fit", rest),
        "validate": lambda rest: lightning_command("validate", rest),
        "test": lambda rest: lightning_command("test", rest),
        "predict": predict_command,
        "evaluate": evaluate_command,
        "anchors": _anchors,
        "show-data": _show_data,
        "ablate": ablate_command,
        "report": report_command,
        "compare": compare_command,
        "benchmark": _benchmark,
        "doctor": doctor_command,
        "mini-voc": mini_voc_command,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        return _complain(f"{arguments[0]!r} is not a command of frcnn; there are {', '.join(commands)}")
    try:
        commands[arguments[0]](arguments[1:])
    except InputError as error:
        return _complain(one_line(error), error.details)
    except TrainingError as error:
        _complain(one_line(error))
        return 1
    return 0


def _anchors(arguments: list[str]) -> None:
    from experiments.anchors.command import print_audit

    quiet()
    with one_line_of_the_parser(arguments):
        print_audit(arguments)


def _show_data(arguments: list[str]) -> None:
    from experiments.dataset.show_data import show_data

    quiet()
    with one_line_of_the_parser(arguments):
        show_data(arguments)


def _benchmark(arguments: list[str]) -> None:
    from experiments.benchmark.command import run_benchmark

    quiet()
    with one_line_of_the_parser(arguments):
        run_benchmark(arguments)


def one_line(error: BaseException) -> str:
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
