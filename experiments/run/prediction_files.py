"""What `frcnn predict` writes, image by image, and where: no file of the user's is overwritten."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from datamodules.image_files import FoundImages
from detector.errors import InputError
from detector.files import replacing
from detector.use.drawing import is_saved_picture
from experiments.output import writing
from experiments.results.files import write_devkit_results

PREDICTIONS: Final = "predictions.json"
JOURNAL: Final = "predictions.partial.jsonl"
_ORIGIN: Final = b'{"frcnn predict": '  # how a journal begins
_KEYS: Final = {"image_id", "file_name", "category_id", "category_name", "bbox", "score"}


def picture_names(names: Sequence[str]) -> list[str]:
    """Return names of pictures: a.jpg for a.png; a.png.jpg and a.bmp.jpg for images that differ in suffixes alone.

    No two are the same, also where a file system does not tell capitals from small letters, and none is the name of a
    folder that another one lies in.
    """
    plain = [str(Path(name).with_suffix(".jpg")) for name in names]
    count = Counter(map(_same, plain))
    taken = {_same(str(parent)) for name in names for parent in Path(name).parents} | {_same(PREDICTIONS)}
    alone = [count[_same(name)] == 1 and _same(name) not in taken for name in plain]
    taken |= {_same(name) for name, free in zip(plain, alone, strict=True) if free}
    found = []
    for name, picture, free in zip(names, plain, alone, strict=True):
        chosen, number = (picture if free else f"{name}.jpg"), 2
        while not free and _same(chosen) in taken:
            chosen, number = f"{name}.{number}.jpg", number + 1
        taken.add(_same(chosen))
        found.append(chosen)
    return found


def _same(name: str) -> str:
    """Return what is equal for names that a file system may take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def check_output(output: Path, images: Path, found: FoundImages, pictures: Sequence[str], save: Sequence[str]) -> None:
    """Make the folder for what is saved, unless something of the user's would be lost there.

    Args:
        output: The folder.
        images: The image or the folder of images that was given.
        found: The images in it.
        pictures: File names in the folder.
        save: What is to be saved.

    Raises:
        InputError: It is the folder of the images, or no folder, or cannot be written to, or holds a file of the name
            of one that is to be written, which no earlier prediction wrote.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise InputError(f"--output {output}: is no folder that can be written to ({error.strerror})") from error
    if images.is_dir() and output.samefile(images):
        raise InputError(f"--output {output}: is the folder of the images; give another one")
    there = [name for name in pictures if os.path.lexists(output / name)] if "images" in save else []
    inputs = {_identity(found.folder / name) for name in found.names if there} - {None}
    foreign = [name for name in there if not is_saved_picture(output / name) or _identity(output / name) in inputs]
    if os.path.lexists(output / PREDICTIONS) and not _is_prediction(output / PREDICTIONS):
        foreign.append(PREDICTIONS)
    if (output / JOURNAL).is_file():  # which says that the others are of this command
        with (output / JOURNAL).open("rb") as file:
            foreign += [] if file.read(len(_ORIGIN)) == _ORIGIN else [JOURNAL]
    else:
        places = {"voc": ["Annotations"], "yolo": ["labels", "classes.txt"], "csv": ["predictions.csv"]}
        foreign += [name for kind in save for name in places.get(kind, []) if os.path.lexists(output / name)]
        foreign += [path.name for path in output.glob("comp4_det_test_*.txt")] if "devkit" in save else []
    if foreign:
        more = f" (and {len(foreign) - 1} more files)" if len(foreign) > 1 else ""
        raise InputError(
            f"--output {output}: {foreign[0]}{more} is there already, and frcnn predict did not write it there for "
            "these images; give another folder"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what is equal for all names of one file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_prediction(path: Path) -> bool:
    """Return whether an earlier prediction wrote this; that of a run is its evaluation's."""
    if path.is_symlink() or not path.is_file() or path.with_name("metrics.json").exists():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            start = file.read(2**16).strip()
        if start == "[]":
            return True
        entry, _ = json.JSONDecoder().raw_decode(start.removeprefix("[").lstrip())
    except (OSError, ValueError, RecursionError):
        return False
    return start.startswith("[") and isinstance(entry, dict) and set(entry) >= _KEYS


class Journal:
    """What a prediction has found so far, on disk: memory does not grow with it, and a kill loses nothing.

    Args:
        path: The file: a line that says of which images and options it is, and a line for each image.
        origin: What that first line says. A file of another origin is begun anew, and that is said.

    Attributes:
        next: Number of the first image that is not in it.
        done: Images in it that could be read.
        drawn: Detections drawn on them.
        highest: The highest score of all.
        left_out: By number of an image: why it, or its picture, is missing.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        self.path = path
        self.next = self.done = self.drawn = 0
        self.highest = 0.0
        self.left_out: dict[int, str] = {}
        first = json.dumps(origin).encode() + b"\n"
        end = 0
        if path.is_file():
            with path.open("rb") as file:
                if file.readline() == first:
                    end = file.tell()
                    with contextlib.suppress(ValueError):  # a line that a kill cut short
                        for line in file:
                            self._count(json.loads(line if line.endswith(b"\n") else b""))
                            end += len(line)
                else:
                    print(f"{path}: is of other images or options; beginning anew", file=sys.stderr)
        if end:
            os.truncate(path, end)
        else:
            path.write_bytes(first)
        self._file = path.open("ab")

    def add(self, number: int, rows: Sequence[Mapping[str, Any]] | None, drawn: int = 0, missing: str = "") -> None:
        """Add an image: its COCO results, None for one that cannot be read; and why it, or its picture, is missing."""
        entry = {"number": number, "rows": rows, "drawn": drawn, "missing": missing}
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        self._count(entry)

    def _count(self, entry: Mapping[str, Any]) -> None:
        self.next = entry["number"] + 1
        if entry["missing"]:
            self.left_out[entry["number"]] = entry["missing"]
        if entry["rows"] is not None:
            self.done += 1
            self.drawn += entry["drawn"]
            self.highest = max([self.highest, *(row["score"] for row in entry["rows"])])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all results, one by one."""
        with self.path.open("rb") as file:
            next(file)
            for line in file:
                yield from json.loads(line)["rows"] or []

    def write(self, output: Path, save: Sequence[str], class_names: Sequence[str]) -> None:
        """Write the files that hold the results of all images.

        Raises:
            InputError: One cannot be written.
        """
        if "json" in save:
            with writing(str(output / PREDICTIONS)), replacing(output / PREDICTIONS) as file:
                separator = b"["
                for row in self.rows():
                    file.write(separator + json.dumps(row, allow_nan=False).encode())
                    separator = b", "
                file.write((b"" if separator == b", " else b"[") + b"]\n")
        if "csv" in save:
            with writing(str(output / "predictions.csv")), replacing(output / "predictions.csv") as file:
                text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
                rows = csv.writer(text)
                rows.writerow(("file_name", "class", "score", "x1", "y1", "x2", "y2"))
                for row in self.rows():
                    x, y, width, height = row["bbox"]
                    corners = (x, y, round(x + width, 3), round(y + height, 3))
                    rows.writerow((row["file_name"], row["category_name"], row["score"], *corners))
                text.detach()
        if "devkit" in save:
            write_devkit_results(self.rows(), class_names, output)

    def close(self, remove: bool) -> None:
        """Close the file; remove it when all is done."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)
