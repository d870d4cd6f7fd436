"""The options of `frcnn doctor` and `frcnn mini-voc`."""

import sys

from experiments.arguments import Parser, add_max_pixels, names


def mini_voc_command(arguments: list[str]) -> None:
    """Parse the arguments of `frcnn mini-voc`, and run it."""
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


def doctor_command(arguments: list[str]) -> None:
    """Parse the arguments of `frcnn doctor`, and run it."""
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
    add_max_pixels(parser)
    parser.add_argument("--no-images", "--no_images", action="store_true", help="annotations alone")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(table)")
    parser.add_argument("--plot", metavar="FILE", help="draw classes, object sizes and aspect ratios: .png, .pdf, .svg")
    options = parser.parse_args(arguments)
    from pathlib import Path

    from datamodules.doctor.examine import DoctorOptions
    from datamodules.image_reading import Reading
    from experiments.dataset.doctor import Output, doctor

    splits = {part: given for part in ("train", "val", "test") if (given := getattr(options, part))}
    reading = Reading(options.bit_depth, options.max_pixels)
    healthy = doctor(
        DoctorOptions(Path(options.root), splits, options.class_names, not options.no_images, reading),
        Output(options.format, options.plot),
    )
    if not healthy:
        sys.exit(1)
