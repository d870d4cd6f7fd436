"""Where the files of a dataset in VOC format are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from datamodules.voc.format import IMAGE_SUFFIXES
from detector.errors import InputError

VOC_CLASSES: Final = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_YEAR_SPLIT = re.compile(r"(\d{4})_(.+)")


@dataclass(frozen=True)
class Split:
    """A split of one dataset folder.

    Args:
        folder: Holds JPEGImages/, Annotations/ and ImageSets/Main/.
        name: The split file's stem, e.g. "trainval".
    """

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """Return the split file."""
        return self.folder / "ImageSets" / "Main" / f"{self.name}.txt"


def is_plain(root: Path) -> bool:
    """Return whether `root` is itself a dataset folder rather than one that holds VOC<year>/."""
    return (root / "ImageSets" / "Main").is_dir() or (root / "Annotations").is_dir()


def dataset_folders(root: Path) -> list[Path]:
    """Return `root` itself if it is a dataset folder, else its VOC<year>/, in `root` or in `root`/VOCdevkit."""
    if is_plain(root):
        return [root]
    folders = [*root.glob("VOC[0-9][0-9][0-9][0-9]"), *root.glob("VOCdevkit/VOC[0-9][0-9][0-9][0-9]")]
    return sorted(folders, key=lambda folder: folder.name)


def check_root(root: Path) -> None:
    """Raise InputError unless `root` is, or holds, a dataset folder."""
    if not root.is_dir():
        raise InputError(
            f"--data.root {root}: no such folder; `frcnn mini-voc OUT_DIR` writes a small synthetic dataset, "
            "--data.download true fetches VOC years"
        )
    if not dataset_folders(root):
        raise InputError(
            f"--data.root {root}: holds neither VOC<year>/ nor JPEGImages/, Annotations/ and ImageSets/Main/"
        )


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


def find_image(folder: Path, stem: str, stated: str = "") -> Path:
    """Return the image `stem` in `folder`/JPEGImages, .jpg before other suffixes, which may be in capitals.

    Args:
        folder: Of the dataset.
        stem: Name of the annotation file, which is what counts.
        stated: The file name that the annotation states, which is only mentioned.

    Raises:
        InputError: There is none.
    """
    images = folder / "JPEGImages"
    for suffix in IMAGE_SUFFIXES if images.is_dir() else ():
        path = images / f"{stem}{suffix}"
        if path.is_file():
            return path
    base = stated.replace("\\", "/").rsplit("/", 1)[-1]
    hint = f"; its annotation states {base}, which is there: rename it" if base and (images / base).is_file() else ""
    raise InputError(f"{images / stem}.jpg: no such image (nor .jpeg or .png), but a split names it{hint}")
