"""Where the files of a dataset in VOC format are."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from datamodules.splits import parts_of
from datamodules.voc.format import IMAGE_SUFFIXES, read_split
from datamodules.voc.names import annotated_names, annotations_folder, names_below
from detector.errors import InputError, listed

_FOLDERS: Final = ("JPEGImages", "images", "Images")
_ANNOTATION = re.compile(rb"<(\w+:)?annotation[\s>]", re.IGNORECASE)
_YEAR_SPLIT = re.compile(r"(\d{4})_(.+)")


@dataclass(frozen=True)
class Split:
    """A split of one dataset folder.

    Args:
        folder: Holds JPEGImages/, Annotations/ and ImageSets/Main/, or these files in another way.
        name: The split file's stem, e.g. "trainval", or where there is no such file a folder of annotations.
    """

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """Return the split file, or the folder."""
        file = self.folder / "ImageSets" / "Main" / f"{self.name}.txt"
        place = annotations_folder(self.folder) / self.name
        return place if place.is_dir() and not file.is_file() else file

    def names(self, repeats: bool = False) -> list[str]:
        """Return the names of its images, as `read_split` does; raise InputError if there is no such split."""
        if not self.path.is_dir():
            folders = part_folders(self.folder)
            if folders and not self.path.exists():
                raise InputError(f"{self.folder}: has no split {self.name!r}; its folders are {listed(folders)}")
            return read_split(self.path, repeats)
        names = [name for name in annotated_names(self.folder) if name.startswith(f"{self.name}/")]
        if not names:
            raise InputError(f"{self.path}: holds no XML file, so there are no images in this split")
        return names


def part_folders(folder: Path) -> list[str]:
    """Return the folders of annotations that are named for training, validation or testing, such as train."""
    below = sorted(path for path in annotations_folder(folder).glob("*/") if parts_of(path.name))
    return [path.name for path in below if next(path.rglob("*.[xX][mM][lL]"), None)]


def is_plain(root: Path) -> bool:
    """Return whether `root` is itself a dataset folder rather than one that holds VOC<year>/."""
    if (root / "ImageSets" / "Main").is_dir() or (root / "Annotations").is_dir():
        return True
    return not _years(root) and _holds_annotations(root)


def _holds_annotations(root: Path) -> bool:
    """Return whether one of the first XML files in a folder, or two folders below, is an annotation in VOC format."""
    for pattern in ("*", "*/*", "*/*/*"):
        for path in islice(root.glob(f"{pattern}.[xX][mM][lL]"), 5):
            elsewhere = pattern == "*/*/*" and (path.parents[1] / "ImageSets").is_dir()
            if not elsewhere and path.is_file() and _ANNOTATION.search(path.read_bytes()[:2000]):
                return True
    return False


def _years(root: Path) -> list[Path]:
    return [*root.glob("VOC[0-9][0-9][0-9][0-9]"), *root.glob("VOCdevkit/VOC[0-9][0-9][0-9][0-9]")]


def dataset_folders(root: Path) -> list[Path]:
    """Return `root` itself if it is a dataset folder, else its VOC<year>/, in `root` or in `root`/VOCdevkit."""
    if is_plain(root):
        return [root]
    return sorted(_years(root), key=lambda folder: folder.name)


def find_split(root: Path, name: str) -> Split:
    """Return the split that `name` means in `root`: a plain name in a dataset folder, else <year>_<split>.

    Raises:
        InputError: `root` holds years and the name has none. Whether the split file is there is not looked at.
    """
    if is_plain(root):
        return Split(root, name)
    match = _YEAR_SPLIT.fullmatch(name)
    if match is None:
        years = ", ".join(sorted({folder.name.removeprefix("VOC") for folder in dataset_folders(root)})) or "none yet"
        raise InputError(f"split {name!r}: write <year>_<split>, such as 2007_{name} (years in {root}: {years})")
    year, rest = match.groups()
    splits = [Split(folder / f"VOC{year}", rest) for folder in (root, root / "VOCdevkit")]
    with_file = [split for split in splits if split.path.is_file()]
    return next(iter(with_file or [split for split in splits if split.folder.is_dir()]), splits[-1])


def image_folders(folder: Path) -> list[Path]:
    """Return the folders that the images of a dataset folder may be below: JPEGImages/ or images/, else others."""
    named = [path for path in (folder / name for name in _FOLDERS) if path.is_dir()]
    place = annotations_folder(folder)
    return named[:1] or ([folder] if place == folder else [folder / _FOLDERS[0], place, folder])


def images_in(folder: Path) -> set[str]:
    """Return the names of the images of a dataset folder: their paths below the folder of images, without suffix."""
    found = (names_below(place, IMAGE_SUFFIXES, _FOLDERS if place == folder else ()) for place in image_folders(folder))
    return next(filter(None, found), set())


class ImageFinder:
    """Where the images of a dataset folder are: in JPEGImages/, .jpg before other suffixes, which may be in capitals.

    Which suffixes occur in a folder is found out at the first image that it lacks: where all images are missing,
    asking for each by each suffix takes longer than reading the annotations.

    Attributes:
        place: The folder where they should be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places = image_folders(folder)
        self._suffixes: dict[str, list[str]] = {}  # by folder
        self.place = self._places[0]

    def find(self, stem: str, stated: str = "") -> Path:
        """Return the image of an annotation.

        Args:
            stem: Name of the annotation file, which is what counts.
            stated: The file name that the annotation states, which is only mentioned.

        Raises:
            InputError: There is none.
        """
        above, _, last = stem.rpartition("/")
        inner = [self._folder / above / name for name in _FOLDERS] if self._places[-1] == self._folder else []
        for place, name in (*((place, last) for place in inner), *((place, stem) for place in self._places)):
            if (path := self._with_suffix(f"{place}/{name}")) is not None:
                return path
        base = stated.replace("\\", "/").rsplit("/", 1)[-1]
        there = base and os.path.isfile(self.place / base)
        hint = f"; its annotation states {base}, which is there: rename it" if there else ""
        raise InputError(f"{self.place / stem}.jpg: no such image (nor .jpeg or .png), but a split names it{hint}")

    def _with_suffix(self, name: str) -> Path | None:
        folder = os.path.dirname(name)
        if folder not in self._suffixes:
            if os.path.isfile(name + IMAGE_SUFFIXES[0]):
                return Path(name + IMAGE_SUFFIXES[0])
            try:
                found = {os.path.splitext(file)[1] for file in os.listdir(folder)}
            except PermissionError:  # files in it may be readable all the same
                found = set(IMAGE_SUFFIXES)
            except OSError:  # there is none
                found = set()
            self._suffixes[folder] = [suffix for suffix in IMAGE_SUFFIXES if suffix in found]
        paths = (name + suffix for suffix in self._suffixes[folder])
        return next((Path(path) for path in paths if os.path.isfile(path)), None)
