"""`frcnn init`: look at a dataset, and write a config for it that trains at once."""

import json
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.dataset_format import DatasetFormat
from datamodules.detection_datamodule import DetectionDataModule
from datamodules.doctor.examine import DoctorOptions, Report, examine
from datamodules.doctor.splits import read_split_table
from datamodules.problems import KINDS
from datamodules.splits import PARTS
from detector.errors import InputError, listed
from experiments.benchmark.expectation import Expectation, expect_training
from experiments.dataset.data_format import DataFormat
from experiments.dataset.formats import FORMATS, data_module_of, dataset_format
from experiments.dataset.options import InitOptions
from experiments.dataset.settings import choose_network, choose_settings, this_machine
from experiments.output import duration, option_text, templates, writing
from experiments.run.folder import choose_run_folder

DECODED: Final = 5000
"""Images up to which all are decoded, as `frcnn doctor` does."""
LINE: Final = 120
SIDED: Final = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Dataset:
    """What was found.

    Attributes:
        data_format: Its format.
        data: The images and objects of a training.
        report: All that the doctor says.
        skip: Why not everything can be used; empty where it can.
    """

    data_format: DataFormat
    data: DetectionDataModule
    report: Report
    skip: str

    @property
    def images(self) -> tuple[int, int]:
        """Return how many images there are to train and to validate on."""
        return len(self.data.train_dataset), len(self.data.val_dataset)


def init(options: InitOptions) -> None:
    """Look at the dataset and at the machine, write the config, time it, and print a summary.

    Raises:
        InputError: No dataset there, too few images with objects, or a file that may not be written.
    """
    root = Path(options.root).resolve()
    path = Path(options.output or f"{root.parent.name if root.is_file() else root.name}.yaml")
    if path.exists() and not options.overwrite:
        raise InputError(f"{path}: is there already; --overwrite true replaces it, --output names another file")
    found = look_at(options)
    machine = this_machine()
    network, weights, about_weights = choose_network(options.backbone, options.weights, machine)
    settings = choose_settings(network, weights, found.data.ground_truth("train"), machine)
    settings["why"]["weights"] = about_weights
    settings |= {"machine": machine.name, "commands": _commands(path, found)}
    text = config_text(options.root, found, settings)
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    _print(options.root, path, found, settings, expect_training(path, found.images[0]))


def look_at(options: InitOptions) -> Dataset:
    """Recognise a dataset, choose its splits, and read everything that a training on it reads.

    Raises:
        InputError: It cannot be recognised, or not one image can be used.
    """
    data_format, format = _recognise(options)
    splits, val_fraction = _choose_splits(format, options.val_fraction)

    def read(on_error: str) -> DetectionDataModule:
        named: dict[str, Any] = {f"{part}_splits": names for part, names in splits.items()}
        kind = data_module_of(data_format)
        data: DetectionDataModule = kind(options.root, **named, val_fraction=val_fraction, on_error=on_error)
        data.setup()
        return data

    skip = ""
    try:
        data = read("raise")
    except InputError as error:
        data, skip = read("skip"), str(error)
    images = len(data.train_dataset) + len(data.val_dataset)
    report = examine(DoctorOptions(data.format, images=images <= DECODED))
    return Dataset(data_format, data, report, skip)


def _recognise(options: InitOptions) -> tuple[DataFormat, DatasetFormat]:
    """Return the format that is asked for, or the first one of ours that the folder looks like."""
    for name in FORMATS if options.data_format is None else [options.data_format]:
        format = dataset_format(name, options.root)
        if options.data_format is not None or format.offered() is not None:
            format.check_root()
            return name, format
    raise InputError(f"{options.root}: holds no annotations in a known format; there are {', '.join(FORMATS)}")


def _choose_splits(format: DatasetFormat, val_fraction: float) -> tuple[dict[str, list[str]], float | None]:
    """Return splits by part, told by their names, and the share of images to validate on where none is for that."""
    splits = {split.label: split for split in read_split_table(format, {}).splits if split.members}
    found: dict[str, list[str]] = {}
    for name, split in splits.items():
        found.setdefault("".join(part for part in PARTS if part in split.parts), []).append(name)
    others = found.get("", [])
    if len(others) > 1:  # which may hold the same images
        others = [max(others, key=lambda name: len(splits[name].members))] if format.needs_splits else []
    train = found.get("train") or found.get("trainval") or found.get("val") or others
    val = found.get("val", []) if "train" in found else []
    return {"train": train, "val": val, "test": found.get("test", [])}, None if val else val_fraction


def config_text(root: str, found: Dataset, settings: dict[str, Any]) -> str:
    """Return the config, as `init.yaml.j2` lays it out."""
    pages = templates(Path(__file__).parent)
    pages.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=not str(value).isprintable())  # JSON is YAML
    report = found.report
    text = pages.get_template("init.yaml.j2").render(
        settings,
        root=root,
        data_format=option_text(found.data_format),
        report=report,
        classes=[(name, report.classes.get(name, 0)) for name in found.data.class_names],
        splits=found.data.splits.names,
        val_fraction=found.data.splits.val_fraction,
        images=found.images,
        skip=found.skip,
        sided=any(SIDED.search(name) for name in found.data.class_names),
    )
    return "".join(f"{line}\n" for line in _short_lines(text))


def _short_lines(text: str) -> Iterator[str]:
    """Yield lines, with the comments of those that are too long above them."""
    for line in text.splitlines():
        code, mark, comment = line.rpartition("  # ")
        if len(line) <= LINE or not mark:
            yield line
            continue
        margin = code[: len(code) - len(code.lstrip())] + "# "
        words = textwrap.TextWrapper(LINE - len(margin), break_long_words=False, break_on_hyphens=False)
        yield from (margin + part for part in words.wrap(comment))
        yield code


def _commands(path: Path, found: Dataset) -> list[str]:
    """Return what to run next: training, detection in images that it is validated on, and a test where it can be."""
    run = shlex.quote(str(choose_run_folder("runs", path.stem, None, seed=0)))
    images = shlex.quote(str(found.data.val_dataset.files[0].path.parent))
    best = f"--ckpt_path {run}/checkpoints/best.ckpt"
    test = [f"frcnn test {best}"] if found.data.splits.names["test"] else []
    predict = f"frcnn predict {best} --images {images} --output {run}/pictures"
    return [f"frcnn fit --config {shlex.quote(str(path))}", predict, *test]


def _print(root: str, path: Path, found: Dataset, settings: dict[str, Any], expected: Expectation) -> None:
    report, (train, val) = found.report, found.images
    kinds = Counter(problem.kind for problem in report.problems)
    low, high = (60 * minutes for minutes in expected.minutes)
    classes = [f"{name} {report.classes.get(name, 0)}" for name in found.data.class_names]
    names = found.data.splits.names
    made = f"{listed(names['train'])} and {listed(names['val'])}" if names["val"] else "made by val_fraction"
    table = Table(title=f"{root}: {found.data.format.name} format", show_header=False)
    for title, text in {
        "images": f"{report.images}: {train} to train on, {val} to validate on ({made})",
        "objects": f"{report.objects} of {len(classes)} classes: {listed(classes, 12)}",
        "problems": (listed([f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind]]) or "none")
        + ("; on_error: skip leaves out what cannot be used" if found.skip else ""),
        "machine": settings["machine"],
        "network": f"{settings['network']}, weights {settings['weights']}: {settings['why']['weights']}",
        "image size": f"{settings['shortest']}, longer side up to {settings['longest']}; {settings['why']['shortest']}",
        "anchors": settings["why"]["anchors"],
        "training": f"{settings['epochs']} epochs of {train} images, {settings['batch_size']} in a step",
        "time": f"about {duration(low)} to {duration(high)} on this machine: {expected}",
    }.items():
        table.add_row(title, escape(text))
    Console(highlight=False).print(table)
    other = "" if found.data_format == "voc" else f" --data_format {shlex.quote(option_text(found.data_format))}"
    doctor = [f"frcnn doctor {shlex.quote(root)}{other}"] if report.problems else []
    print(f"{path} is written, with the reasons for all values. Next:")
    print(*(f"  {command}" for command in [*settings["commands"], *doctor]), sep="\n")
