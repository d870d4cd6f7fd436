"""YOLO's text files: one label file a picture, and what data.yaml or a list of names says of the whole dataset.

A line of a label file is `class cx cy w h`, centre and sides as shares of the picture as it is shown, or a class and
the corners of a polygon, of which the box around it is taken. There is no word for difficult objects.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from datamodules.dataset_format import Box, ObjectRecord
from datamodules.problems import Kind, Problem
from datamodules.text_files import class_name, decode_text
from detector.errors import InputError, brief, shortened
from detector.files import load_yaml

THING: Final = "object {}"
NAME_FILES: Final = ("classes.txt", "labels/classes.txt", "obj.names", "_darknet.labels", "*/_darknet.labels")
SPLIT_KEYS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ROUNDING: Final = 0.5  # pixels; boxes that reach further beyond their image are said to


@dataclass(frozen=True)
class Description:
    """What a dataset says of itself.

    Args:
        file: data.yaml, or a list of names; None where there is neither.
        names: Of the classes by number; None where there are none.
        splits: Folders of images and lists of them, by part.
        keypoints: Whether lines go on with key points after the box.
    """

    file: Path | None = None
    names: Mapping[int, str] | None = None
    splits: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    keypoints: bool = False


def read_description(root: Path) -> Description:
    """Read data.yaml, or another YAML file that names classes, else a list of names such as classes.txt.

    Args:
        root: The dataset folder, or the YAML file.

    Raises:
        InputError: Such a file cannot be read, or says something else than it should.
    """
    folder = root if root.is_dir() else root.parent
    files = [*folder.glob("data.y*ml"), *sorted(folder.glob("*.y*ml"))] if root.is_dir() else [root]
    for file in files:
        try:
            return _described(_load(file), file)
        except InputError:
            if file.stem == "data" or not root.is_dir():
                raise
    for file in (file for pattern in NAME_FILES for file in sorted(folder.glob(pattern))):
        names = [class_name(line) for line in _text(file).splitlines()]
        return Description(file, _checked(dict(enumerate(filter(None, names))), file))
    return Description()


def _load(file: Path) -> Any:
    return load_yaml(_text(file), file, yaml.BaseLoader)  # texts alone: "no" is a name, not False


def _text(file: Path) -> str:
    try:
        return decode_text(file.read_bytes(), file, "text")
    except OSError as error:
        raise InputError(f"{file}: cannot be read as text ({brief(error)})") from error


def _described(content: Any, file: Path) -> Description:
    if not isinstance(content, dict) or not {"names", "nc"} & set(content):
        raise InputError(f"{file}: has no names; a description of YOLO data has the keys names, train, val")
    names = content.get("names") or [f"class_{number}" for number in range(_number(content.get("nc"), file))]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(name, str) and class_name(name) for name in names.values()):
        raise InputError(f"{file}: has names {shortened(str(names))}; a list, or a mapping from numbers to names")
    numbered = {_number(number, file): class_name(name) for number, name in names.items()}
    given = content.get("path")
    places = [file.parent / str(given), Path(str(given)).expanduser()] if given else []
    base = next(filter(os.path.isdir, places), file.parent)
    splits: dict[str, list[Path]] = {}
    for key, part in SPLIT_KEYS.items():
        entries = content.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            splits.setdefault(part, []).append(_place(str(entry), base, file.parent))
    return Description(file, _checked(numbered, file), splits, "kpt_shape" in content)


def _number(value: Any, file: Path) -> int:
    text = str(value)
    if not (text.isascii() and text.isdecimal() and len(text) <= 6):
        raise InputError(f"{file}: has {shortened(text)} where the number of a class or of classes is needed")
    return int(text)


def _checked(names: dict[int, str], file: Path) -> dict[int, str]:
    if len(set(names.values())) < len(names) or not names:
        raise InputError(f"{file}: has no names, or one of them twice: {', '.join(names.values())}")
    return dict(sorted(names.items()))


def _place(entry: str, base: Path, folder: Path) -> Path:
    """Return the folder or list that a description names; Roboflow begins with one `../` too many."""
    candidates = [base / entry, base / entry.removeprefix("../"), folder / entry, folder / entry.removeprefix("../")]
    return folder / os.path.relpath(next(filter(os.path.exists, candidates), candidates[0]), folder)


def is_label(path: Path) -> bool:
    """Return whether the first line of a file is one of a label file."""
    try:
        words = next(filter(None, map(str.split, path.read_text(encoding="utf-8").splitlines())), [])
        return len(words) >= 5 and all(math.isfinite(float(word)) for word in words)
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Label:
    """What a label file says.

    Args:
        objects: All objects, those that cannot be used without a box.
        problems: What is wrong with these.
        polygons: Whether there are polygons among them.
    """

    objects: list[ObjectRecord]
    problems: list[Problem]
    polygons: bool


class _WrongError(Exception):
    """Say what is wrong with a line: the kind, and a text."""


def read_label(text: str, path: Path, size: tuple[int, int], names: Mapping[int, str] | None, keypoints: bool) -> Label:
    """Read the text of a label file.

    Args:
        text: The text.
        path: The file.
        size: (width, height) of the image as it is shown; zeros, where it is not there, give no boxes.
        names: Of the classes; None gives each number a name.
        keypoints: Whether lines go on with key points.
    """
    objects: list[ObjectRecord] = []
    problems: list[Problem] = []
    polygons = False
    lines = [line for line in text.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        name, box = "", None
        try:
            numbers = [_finite(word) for word in line.split()]
            name = "" if math.isnan(numbers[0]) else _name(numbers[0], names)
            _check(numbers)
            values = numbers[1:5] if keypoints else numbers[1:]
            polygons |= len(values) > 4
            box = _box(values, size)
        except _WrongError as error:
            kind, what = error.args
            message = f"{path}: {THING.format(index)} ({shortened(line.strip())}) {what}"
            problems.append(Problem(str(path), index, kind, message))
        objects.append(ObjectRecord(index, name, box))
    return Label(objects, problems, polygons)


def _finite(word: str) -> float:
    try:
        return float(word) if math.isfinite(float(word)) else math.nan
    except ValueError:
        return math.nan


def _check(numbers: Sequence[float]) -> None:
    kind: Kind = "incomplete_object"
    if any(map(math.isnan, numbers)):
        raise _WrongError(kind, "is not of finite numbers")
    if len(numbers) < 5 or len(numbers) % 2 == 0:
        text = "class, centre x, centre y, width, height, or a class and the corners of a polygon, are needed"
        raise _WrongError(kind, f"has {len(numbers)} columns; {text}")


def _name(number: float, names: Mapping[int, str] | None) -> str:
    if names is None and number >= 0 and number.is_integer():
        return f"class_{int(number)}"
    if names is None or number not in names:
        known = f"; there are {min(names)} to {max(names)}" if names else ""
        raise _WrongError("unknown_class", f"is of the class {number:g}{known}")
    return names[int(number)]


def _box(values: Sequence[float], size: tuple[int, int]) -> Box | None:
    """Return the box in pixels, what is beyond the image by less than `ROUNDING` cut off; None for an unknown size."""
    if max(map(abs, values)) > 2:
        raise _WrongError("box_outside", "has coordinates in pixels; shares of the image, from 0 to 1, are needed")
    if len(values) == 4:
        x, y, width, height = values
        xs, ys = (x - width / 2, x + width / 2), (y - height / 2, y + height / 2)
        if width <= 0 or height <= 0:
            raise _WrongError("negative_box", "has a width or height that is not positive")
    else:
        xs, ys = (min(values[::2]), max(values[::2])), (min(values[1::2]), max(values[1::2]))
        if xs[0] == xs[1] or ys[0] == ys[1]:
            raise _WrongError("negative_box", "has corners without an area between them")
    if min(size) <= 0:
        return None
    x1, x2 = (_pixels(share, size[0]) for share in xs)
    y1, y2 = (_pixels(share, size[1]) for share in ys)
    return x1, y1, x2, y2


def _pixels(share: float, side: int) -> float:
    pixels = round(share * side, 6)  # whole pixels are whole again
    inside = min(max(pixels, 0.0), float(side))
    return inside if abs(inside - pixels) < ROUNDING else pixels
