"""Detections of any detector in files: COCO results (JSON) and the VOC devkit's text files."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.ground_truth import SplitTruth
from detector.errors import InputError, brief, listed, shortened
from detector.files import write_whole
from detector.metrics.voc_ap import Detections
from experiments.output import writing

Row = tuple[int, int, float, float, float, float, float]  # image, label, score, x1, y1, x2, y2


class Problems:
    """Collects what is wrong with the entries of a file, to name the first offender and count those like it."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        """Note an offender; `text` names it, its index included."""
        self._first.setdefault(kind, text)
        self._count[kind] = self._count.get(kind, 0) + 1

    def raise_first(self, path: Path, entries: int) -> None:
        """Raises InputError if there are any."""
        for kind, text in self._first.items():
            raise InputError(f"{path}: {text}; {self._count[kind]} of {entries} entries have {kind}")


class ImageFinder:
    """Image ids of the ground truth from what result files call images.

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
        """The image id, or None if there is no such image."""
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
    if path.is_dir():
        return _detections(list(_devkit_rows(path, truth)))
    return _detections(list(_coco_rows(path, truth, with_classes=True)))


def read_proposals(path: str | Path, truth: SplitTruth) -> Detections:
    """Read proposals from a file of COCO results: `score` is the objectness, classes are not looked at.

    Raises:
        InputError: As `read_results`.
    """
    return _detections(list(_coco_rows(Path(path), truth, with_classes=False)))


def _detections(rows: Sequence[Row]) -> Detections:
    columns = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return Detections(columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64), columns[:, 2], columns[:, 3:])


def _coco_rows(path: Path, truth: SplitTruth, with_classes: bool) -> Iterator[Row]:
    entries = _load(path)
    images = ImageFinder(truth.image_names, truth.result_ids)
    labels: dict[object, int] = {name: label for label, name in enumerate(truth.class_names, start=1)}
    numbers = truth.category_ids or range(1, len(truth.class_names) + 1)
    labels |= {number: label for label, number in enumerate(numbers, start=1)}
    problems = Problems()
    known: dict[object, int | None] = {}
    partners: dict[tuple[str, object], object] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.add(
                "another form", f"entry {index} is {_shown(entry)}, not an object of image, category, bbox, score"
            )
            continue
        name = entry.get("file_name", entry.get("image_id"))
        if not isinstance(name, str | int | float):
            problems.add("no image", f"entry {index} has neither file_name nor image_id")
            continue
        if name not in known:
            known[name] = images.find(name)
        image = known[name]
        if image is None:
            problems.add(
                "unknown images", f"entry {index} is of image {name!r}, which is not in {', '.join(truth.splits)}"
            )
            continue
        number = entry.get("image_id")
        if number is not name and isinstance(number, str | int):
            for key, value in ((("name", name), number), (("id", number), name)):
                if partners.setdefault(key, value) != value:
                    problems.add(
                        "duplicate image names",
                        f"entry {index} has file_name {name!r} and image_id {number!r}, but an earlier one has "
                        f"{key[0]} {key[1]!r} with {partners[key]!r}",
                    )
        category = entry.get("category_name", entry.get("category_id")) if with_classes else truth.class_names[0]
        label = labels.get(category) if isinstance(category, str | int) else None
        if label is None:
            problems.add(
                "unknown classes",
                f"entry {index} is of class {_shown(category)}; there are {listed(truth.class_names)}, or the numbers "
                f"{listed([str(number) for number in numbers]) if truth.category_ids else f'1 to {len(numbers)}'}",
            )
            continue
        row = _numbers(entry, index, problems)
        if row is not None:
            score, (x, y, width, height) = row
            yield image, label, score, x, y, x + width, y + height
    problems.raise_first(path, len(entries))


def _numbers(entry: Mapping[str, Any], index: int, problems: Problems) -> tuple[float, list[float]] | None:
    score: Any = entry.get("score")
    box: Any = entry.get("bbox")
    if not _is_number(score):
        problems.add("scores that are not finite numbers", f"entry {index} has score {_shown(score)}")
    elif not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        problems.add("boxes other than four finite numbers", f"entry {index} has bbox {_shown(box)}")
    elif box[2] < 0 or box[3] < 0:
        problems.add("boxes of negative size", f"entry {index} has bbox {_shown(box)} (x, y, width, height)")
    else:
        return float(score), box
    return None


def _load(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of COCO results, nor folder of devkit files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({brief(error)})") from error
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where, at = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else ("nested too deep", 0)
        whole = text.count("}", 0, at)
        raise InputError(
            f"{path}: no whole JSON document: {where} at character {at} of {len(text)}, in entry {whole}; "
            f"{whole} entries before it are whole. Was it cut short?"
        ) from error
    if not isinstance(entries, list):
        raise InputError(f"{path}: holds a JSON {type(entries).__name__}; COCO results are a list with one entry a box")
    return entries


def _devkit_rows(folder: Path, truth: SplitTruth) -> Iterator[Row]:
    images = ImageFinder(truth.image_names)
    for label, path in sorted(_devkit_files(folder, truth.class_names).items()):
        problems = Problems()
        rows = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text ({brief(error)})") from error
        for index, line in enumerate(lines):
            name, *fields = line.split() or [""]
            try:
                score, x1, y1, x2, y2 = map(float, fields)
            except ValueError:
                problems.add("another form", f"line {index + 1} is {_shown(line)}, not image, score, x1, y1, x2, y2")
                continue
            image = images.find(name)
            if image is None:
                splits = ", ".join(truth.splits)
                problems.add("unknown images", f"line {index + 1} is of image {name!r}, which is not in {splits}")
            elif not all(map(math.isfinite, (score, x1, y1, x2, y2))):
                problems.add("numbers that are not finite", f"line {index + 1} is {_shown(line)}")
            elif x2 < x1 - 1 or y2 < y1 - 1:
                problems.add("boxes of negative size", f"line {index + 1} is {_shown(line)}")
            else:
                rows.append((image, label, score, x1 - 1, y1 - 1, x2, y2))
        problems.raise_first(path, len(lines))
        yield from rows


def _devkit_files(folder: Path, class_names: Sequence[str]) -> dict[int, Path]:
    """By label: the file `<anything>_det_<split>_<class>.txt`."""
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


def write_devkit_results(results: Sequence[Mapping[str, Any]], class_names: Sequence[str], folder: str | Path) -> None:
    """Write `comp4_det_test_<class>.txt` for every class, as the VOC devkit reads them: boxes count pixels from 1.

    Args:
        results: Detections as `coco_results` gives them.
        class_names: All classes; one without detections gets an empty file.
        folder: Where to; made if it is missing.
    """
    lines: dict[str, list[str]] = {name: [] for name in class_names}
    for result in results:
        x, y, width, height = result["bbox"]
        box = " ".join(f"{value:.3f}" for value in (x + 1, y + 1, x + width, y + height))
        stem = os.path.splitext(os.path.basename(result["file_name"]))[0]
        lines[result["category_name"]].append(f"{stem} {result['score']:.9g} {box}\n")
    target = Path(folder)
    with writing(f"{target}: devkit files"):
        for name, text in lines.items():
            write_whole(target / f"comp4_det_test_{name}.txt", "".join(text).encode())


def _is_number(value: object) -> bool:
    # Compared, because a whole number too large for a float is no number that math.isfinite can judge.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _shown(value: object) -> str:
    return shortened(repr(value), 80)
