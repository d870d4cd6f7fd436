"""Detections of any detector in files: COCO results (JSON) and the VOC devkit's text files."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datamodules.ground_truth import SplitTruth
from detector.errors import InputError, brief, listed, shortened
from detector.files import replacing
from detector.metrics.voc_ap import Detections
from experiments.output import writing

Row = tuple[int, int, float, float, float, float, float]  # image, label, score, x1, y1, x2, y2
T = TypeVar("T")


class _WrongError(Exception):
    """Say what is wrong with an entry of a file: the kind, and a text of what the entry is or has."""


class ImageFinder:
    """Find image ids of the ground truth by what result files call images.

    A text is an image's file name or its name without suffix, with or without folders before it. A number is the number
    that the name reads as, such as 7 for 000007 or 2008000008 for 2008_000008; where not all names are numbers, it is
    the position in the split. Where the dataset's files give ids, these count instead.
    """

    def __init__(self, names: Sequence[str], ids: Sequence[int | str] | None = None) -> None:
        self._by_name = {name: position for position, name in enumerate(names)}
        last = [name.rsplit("/", 1)[-1] for name in names]
        counts = Counter(last)
        for position, name in enumerate(last):
            if counts[name] == 1:
                self._by_name.setdefault(name, position)
        numbers = [int(name.replace("_", "")) if re.fullmatch(r"[0-9_]*[0-9]", name) else -1 for name in names]
        distinct = min(numbers, default=-1) >= 0 and len(set(numbers)) == len(numbers)
        given = ids or (numbers if distinct else range(len(names)))
        self._by_id: dict[object, int] = {number: position for position, number in enumerate(given)}

    def find(self, image: object) -> int | None:
        """Return the image id, or None if there is no such image."""
        if isinstance(image, str):
            whole = image.replace("\\", "/")
            base = whole.rsplit("/", 1)[-1]
            spellings = (whole, whole.rsplit(".", 1)[0], base, base.rsplit(".", 1)[0])
            named = next((self._by_name[name] for name in spellings if name in self._by_name), None)
            return self._by_id.get(image) if named is None else named
        if isinstance(image, float) and image.is_integer():
            image = int(image)
        return self._by_id.get(image) if isinstance(image, int) and not isinstance(image, bool) else None


def read_results(path: str | Path, truth: SplitTruth) -> Detections:
    """Read a file of COCO results, or a folder of devkit files, and check every entry.

    Raises:
        InputError: One line for the first offender: unknown images or classes, values that are not numbers, boxes of
            negative size, names and ids of images that contradict each other, a damaged file.
    """
    path = Path(path)
    return _detections(_devkit_rows(path, truth) if path.is_dir() else _coco_rows(path, truth, with_classes=True))


def read_proposals(path: str | Path, truth: SplitTruth) -> Detections:
    """Read proposals from a file of COCO results: `score` is the objectness, classes are not looked at.

    Raises:
        InputError: Anything wrong with the file, in one line.
    """
    return _detections(_coco_rows(Path(path), truth, with_classes=False))


def _detections(rows: Sequence[Row]) -> Detections:
    columns = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return Detections(columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64), columns[:, 2], columns[:, 3:])


def _rows(path: Path, entries: Sequence[T], name: str, first: int, read: Callable[[T], Row]) -> list[Row]:
    """Read the entries of a file.

    Raises:
        InputError: Names the first entry that is wrong, and counts those that are wrong in the same way.
    """
    rows: list[Row] = []
    wrong: list[tuple[str, str]] = []
    for index, entry in enumerate(entries, start=first):
        try:
            rows.append(read(entry))
        except _WrongError as error:
            kind, text = error.args
            wrong.append((kind, f"{name} {index} {text}"))
    if wrong:
        kind, text = wrong[0]
        alike = sum(other == kind for other, _ in wrong)
        raise InputError(f"{path}: {text}; {alike} of {len(entries)} entries have {kind}")
    return rows


def _coco_rows(path: Path, truth: SplitTruth, with_classes: bool) -> list[Row]:
    find = cache(ImageFinder(truth.image_names, truth.result_ids).find)
    labels: dict[object, int] = {name: label for label, name in enumerate(truth.class_names, start=1)}
    numbers = truth.category_ids or range(1, len(truth.class_names) + 1)
    labels |= {number: label for label, number in enumerate(numbers, start=1)}
    there = listed([str(number) for number in numbers]) if truth.category_ids else f"1 to {len(numbers)}"
    partners: dict[tuple[str, object], object] = {}

    def read(entry: Any) -> Row:
        if not isinstance(entry, dict):
            raise _WrongError("another form", f"is {_shown(entry)}, not an object of image, category, bbox, score")
        name, number = entry.get("file_name", entry.get("image_id")), entry.get("image_id")
        if not isinstance(name, str | int | float):
            raise _WrongError("no image", "has neither file_name nor image_id")
        image = find(name)
        if image is None:
            raise _WrongError("unknown images", f"is of image {name!r}, which is not in {', '.join(truth.splits)}")
        if number is not name and isinstance(number, str | int):
            for key, value in ((("name", name), number), (("id", number), name)):
                if partners.setdefault(key, value) != value:
                    raise _WrongError(
                        "duplicate image names",
                        f"has file_name {name!r} and image_id {number!r}, but an earlier one has {key[0]} {key[1]!r} "
                        f"with {partners[key]!r}",
                    )
        category = entry.get("category_name", entry.get("category_id")) if with_classes else truth.class_names[0]
        label = labels.get(category) if isinstance(category, str | int) else None
        if label is None:
            classes = f"there are {listed(truth.class_names)}, or the numbers {there}"
            raise _WrongError("unknown classes", f"is of class {_shown(category)}; {classes}")
        score, (x, y, width, height) = _numbers(entry)
        return image, label, score, x, y, x + width, y + height

    return _rows(path, _load(path), "entry", 0, read)


def _numbers(entry: Mapping[str, Any]) -> tuple[float, list[float]]:
    score: Any = entry.get("score")
    box: Any = entry.get("bbox")
    if not _is_number(score):
        raise _WrongError("scores that are not finite numbers", f"has score {_shown(score)}")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        raise _WrongError("boxes other than four finite numbers", f"has bbox {_shown(box)}")
    if box[2] < 0 or box[3] < 0:
        raise _WrongError("boxes of negative size", f"has bbox {_shown(box)} (x, y, width, height)")
    return float(score), box


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of COCO results, nor folder of devkit files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({brief(error)})") from error


def _load(path: Path) -> list[Any]:
    text = _text(path)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError, too
        where, at = "nested too deep, or too large a number,", 0
        if isinstance(error, json.JSONDecodeError):
            where, at = error.msg, error.pos
        whole = text.count("}", 0, at)
        raise InputError(
            f"{path}: no whole JSON document: {where} at character {at} of {len(text)}, in entry {whole}; "
            f"{whole} entries before it are whole. Was it cut short?"
        ) from error
    if not isinstance(entries, list):
        raise InputError(f"{path}: holds a JSON {type(entries).__name__}; COCO results are a list with one entry a box")
    return entries


def _devkit_rows(folder: Path, truth: SplitTruth) -> list[Row]:
    find = ImageFinder(truth.image_names).find

    def read(label: int, line: str) -> Row:
        name, *fields = line.split() or [""]
        try:
            score, x1, y1, x2, y2 = map(float, fields)
        except ValueError:
            raise _WrongError("another form", f"is {_shown(line)}, not image, score, x1, y1, x2, y2") from None
        image = find(name)
        if image is None:
            raise _WrongError("unknown images", f"is of image {name!r}, which is not in {', '.join(truth.splits)}")
        if not all(map(math.isfinite, (score, x1, y1, x2, y2))):
            raise _WrongError("numbers that are not finite", f"is {_shown(line)}")
        if x2 < x1 - 1 or y2 < y1 - 1:
            raise _WrongError("boxes of negative size", f"is {_shown(line)}")
        return image, label, score, x1 - 1, y1 - 1, x2, y2

    rows: list[Row] = []
    for label, path in sorted(_devkit_files(folder, truth.class_names).items()):
        rows += _rows(path, _text(path).splitlines(), "line", 1, partial(read, label))
    return rows


def _devkit_files(folder: Path, class_names: Sequence[str]) -> dict[int, Path]:
    """Find the file `<anything>_det_<split>_<class>.txt` of each label."""
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("*_det_*.txt")):
        matching = [label for label, name in enumerate(class_names, start=1) if path.stem.endswith(f"_{name}")]
        if not matching:
            raise InputError(f"{path}: its name ends with no known class; there are {listed(class_names)}")
        label = max(matching, key=lambda label: len(class_names[label - 1]))
        if label in files:
            raise InputError(f"{path}: {files[label].name} is of the class {class_names[label - 1]} too; keep one")
        files[label] = path
    missing = [name for label, name in enumerate(class_names, start=1) if label not in files]
    if missing:
        raise InputError(
            f"{folder}: no file comp4_det_test_{missing[0]}.txt; {len(missing)} of {len(class_names)} classes have "
            "none (write an empty file for a class without detections)"
        )
    return files


def write_devkit_results(results: Iterable[Mapping[str, Any]], class_names: Sequence[str], folder: str | Path) -> None:
    """Write `comp4_det_test_<class>.txt` for every class, as the VOC devkit reads them: boxes count pixels from 1.

    Args:
        results: Detections as `coco_results` gives them; no more than one of them is kept in memory.
        class_names: All classes; one without detections gets an empty file.
        folder: Where to; made if it is missing.
    """
    target = Path(folder)
    with writing(f"{target}: devkit files"), ExitStack() as opened:
        target.mkdir(parents=True, exist_ok=True)
        paths = {name: target / f"comp4_det_test_{name}.txt" for name in class_names}
        files = {name: opened.enter_context(replacing(path)) for name, path in paths.items()}
        for result in results:
            x, y, width, height = result["bbox"]
            box = " ".join(f"{value:.3f}" for value in (x + 1, y + 1, x + width, y + height))
            stem = os.path.splitext(os.path.basename(result["file_name"]))[0]
            files[result["category_name"]].write(f"{stem} {result['score']:.9g} {box}\n".encode())


def _is_number(value: object) -> bool:
    # Compared, because a whole number too large for a float is no number that math.isfinite can judge.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _shown(value: object) -> str:
    return shortened(repr(value), 80)
