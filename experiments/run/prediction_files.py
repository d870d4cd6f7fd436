"""Where `frcnn predict` writes, so that no file of the user's is overwritten: neither an image nor anything else."""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from datamodules.image_files import FoundImages
from detector.errors import InputError
from detector.use.drawing import is_saved_picture

PREDICTIONS: Final = "predictions.json"
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


def check_output(output: Path, images: Path, found: FoundImages, pictures: Sequence[str]) -> None:
    """Make the folder for pictures and predictions, unless something of the user's would be lost there.

    Args:
        output: The folder.
        images: The image or the folder of images that was given.
        found: The images in it.
        pictures: File names in the folder.

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
    inputs = {_identity(found.folder / name) for name in found.names} - {None}
    foreign = [
        name
        for name in pictures
        if os.path.lexists(output / name)
        and (not is_saved_picture(output / name) or _identity(output / name) in inputs)
    ]
    if os.path.lexists(output / PREDICTIONS) and not _is_prediction(output / PREDICTIONS):
        foreign.append(PREDICTIONS)
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
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(entries, list) and all(isinstance(entry, dict) and set(entry) >= _KEYS for entry in entries)
