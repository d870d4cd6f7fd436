"""Plain image files, without annotations, for prediction."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from datamodules.detection_dataset import Target
from detector.errors import InputError
from detector.use.reading import SUFFIXES, USUAL, Reading, read_header, read_image

NOT_READ: Final = (
    *("heic", "heif", "hif", "jxl", "jxr", "svg", "psd", "xcf", "exr", "hdr", "ico", "eps", "wmf", "pcx", "sgi", "dds"),
    *("raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "pef", "srw"),
)
"""Suffixes of pictures that the reader cannot read."""


@dataclass
class FoundImages:
    """The images of a folder by their sorted paths within it, and by such a path why a picture is not among them."""

    folder: Path
    names: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def find_images(path: str | Path, ignore: Callable[[Path], bool] = lambda _: False) -> FoundImages:
    """Find a file, or all images of a folder and its subfolders, also those that are linked.

    Those to ignore are none to be found, such as pictures that were drawn earlier.

    Raises:
        InputError: Nothing there, or no image.
    """
    path = Path(path)
    if path.is_file():
        return FoundImages(path.parent, [path.name])
    if not path.is_dir():
        raise InputError(f"{path}: no such image file or folder")
    found = FoundImages(path)
    for file in _files(path, found.left_out):
        name, suffix = str(file.relative_to(path)), file.suffix.lower().removeprefix(".")
        if file.name.startswith("._"):  # what macOS keeps beside a file on other systems' disks
            continue
        if suffix in NOT_READ:
            found.left_out[name] = f"images of the format {suffix} are not read; save it as JPEG or PNG"
        elif suffix in SUFFIXES and not file.is_file():
            found.left_out[name] = (
                "is a link to a file that is not there" if file.is_symlink() else "is no regular file"
            )
        elif (suffix in SUFFIXES or (not suffix and _is_image(file))) and not ignore(file):
            found.names.append(name)
    found.names.sort()
    if not found.names and not found.left_out:
        raise InputError(f"{path}: holds no image ({', '.join(SUFFIXES)})")
    return found


def _files(folder: Path, left_out: dict[str, str]) -> Iterator[Path]:
    """Find all files below a folder; each linked folder once, so that a link to a folder above ends."""

    def unreadable(error: OSError) -> None:
        left_out[str(Path(str(error.filename)).relative_to(folder))] = f"cannot be looked into ({error.strerror})"

    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(parent) / name for name in files)


def _is_image(file: Path) -> bool:
    """Return whether a file without a suffix is an image, by its content."""
    try:
        return file.is_file() and read_header(file).width > 0
    except InputError:
        return False


class ImageFiles(IterableDataset[tuple[Tensor, Target]]):
    """Image files as samples with an empty target, upright as every viewer shows them.

    Files that cannot be read are passed over.

    Attributes:
        left_out: By name: why an image was passed over, of those that have been asked for.
    """

    def __init__(self, folder: Path, names: Sequence[str], reading: Reading = USUAL) -> None:
        self.folder = folder
        self.file_names = list(names)
        self.reading = reading
        self.left_out: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.file_names)

    def __iter__(self) -> Iterator[tuple[Tensor, Target]]:
        """Yield images uint8 (3, H, W) RGB with their targets; `image_id` is the position in `names`."""
        for index, name in enumerate(self.file_names):
            try:
                pixels = read_image(self.folder / name, True, self.reading)
            except InputError as error:
                self.left_out[name] = str(error)
                continue
            empty = Target(
                boxes=torch.zeros(0, 4),
                labels=torch.zeros(0, dtype=torch.int64),
                difficult=torch.zeros(0, dtype=torch.bool),
                image_id=torch.tensor(index),
                file_name=name,
            )
            yield torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), empty
