"""The `frcnn` command."""

import argparse
import os
import re
import sys
from collections.abc import Callable

from detector.errors import InputError

HELP = """usage: frcnn COMMAND [OPTIONS]      (frcnn COMMAND --help shows all options)

Faster R-CNN on PASCAL VOC in PyTorch Lightning.

  fit        train:     frcnn fit --config experiments/mini_voc.yaml
  validate   evaluate a checkpoint on the validation splits
  test       evaluate a checkpoint on the test splits
  predict    detect objects in image files, and draw them
  mini-voc   write a small synthetic dataset in VOC format
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on bad usage or bad input with one line on stderr, 1 (raised) on a failure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "fit": lambda rest: _lightning("fit", rest),
        "validate": lambda rest: _lightning("validate", rest),
        "test": lambda rest: _lightning("test", rest),
        "predict": _predict,
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
        return _complain(_one_line(error))
    return 0


def _lightning(command: str, arguments: list[str]) -> None:
    # Imported here, so that `frcnn --help` answers at once.
    from jsonargparse import ArgumentError

    from experiments.lightning_cli import run_lightning

    try:
        run_lightning([command, *arguments])
    except ArgumentError as error:
        raise InputError(str(error)) from None


def _predict(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("frcnn predict", description="Detect objects in images with a trained checkpoint.")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of frcnn fit; nothing else of the run is needed")
    parser.add_argument("--images", required=True, help="an image file, or a folder of them")
    parser.add_argument("--output", required=True, help="folder for one annotated image each, and predictions.json")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="draw detections from this score on (0.5)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time (1)")
    parser.add_argument("--accelerator", default="auto", help="as Lightning's: auto, cpu, gpu, ...")
    parser.add_argument("--precision", default="32-true", help="as Lightning's: 32-true, bf16-mixed, 16-mixed")
    options = parser.parse_args(arguments)
    from experiments.predict import predict

    predict(**vars(options))


def _mini_voc(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("frcnn mini-voc", description="Write a small synthetic dataset in VOC format.")
    parser.add_argument("out_dir", help="folder to make; an existing equal one is kept")
    parser.add_argument("--images", type=int, default=300, help="number of images (300): 60% train, 20% val, 20% test")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (0)")
    options = parser.parse_args(arguments)
    from datamodules.mini_voc import write_mini_voc

    folder = write_mini_voc(options.out_dir, options.images, options.seed)
    print(f"{options.images} images in {folder} (splits train, val, trainval, test)")


def _one_line(error: BaseException) -> str:
    """The message of an input error; one from a data loader's worker comes wrapped in the worker's traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rsplit("InputError: ", 1)[-1]
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _complain(message: str) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"frcnn: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
