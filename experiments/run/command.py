"""The commands that run a detector: `frcnn fit`, `validate`, `test` and `predict`."""

import signal
import sys
import warnings

from experiments.arguments import Parser, add_max_pixels, numbers, one_line_of_the_parser, quiet
from experiments.run.startup import quick_imports


def lightning_command(command: str, arguments: list[str]) -> None:
    """Run `frcnn fit`, `validate` or `test` with its arguments."""
    with quick_imports():  # here, so that `frcnn --help` answers at once
        from pytorch_lightning.utilities.exceptions import SIGTERMException

        from experiments.run.lightning_cli import run_lightning

    quiet()
    # Of a checkpoint's callbacks an evaluation needs none, and a training only what `BestCheckpoint` takes over.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    if command != "fit":
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
    try:
        with one_line_of_the_parser(arguments):
            run_lightning([command, *arguments])
    except SIGTERMException:  # a SystemExit without a code, which would be taken for success
        sys.exit(128 + signal.SIGTERM)


def predict_command(arguments: list[str]) -> None:
    """Parse the arguments of `frcnn predict`, and run it."""
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
    add_max_pixels(parser)
    options = parser.parse_args(arguments)
    with quick_imports():
        from pytorch_lightning.utilities.exceptions import SIGTERMException

        from experiments.run.predict import PredictOptions, predict

    quiet()
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
    try:
        complete = predict(PredictOptions(**vars(options)))
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    if not complete:
        sys.exit(1)
