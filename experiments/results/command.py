"""The options of `frcnn evaluate` and `frcnn compare`."""

from experiments.arguments import Parser, names, quiet


def evaluate_command(arguments: list[str]) -> None:
    """Parse the arguments of `frcnn evaluate`, and run it."""
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
    from experiments.results.evaluate import EvaluateOptions, evaluate

    evaluate(EvaluateOptions(**vars(options)))


def compare_command(arguments: list[str]) -> None:
    """Parse the arguments of `frcnn compare`, and run it."""
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
    from experiments.results.compare import CompareOptions, compare

    quiet()
    compare(CompareOptions(**vars(options)))
