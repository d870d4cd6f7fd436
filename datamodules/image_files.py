"""Plain image files, without annotations, for prediction."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.detection_dataset import Target
from datamodules.image_reading import read_image
from detector.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(path: str | Path) -> tuple[Path, list[str]]:
    """A file, or all images of a folder and its subfolders: (folder, sorted names relative to it).

    Raises:
        InputError: Nothing there, or no image.
    """
    path = Path(path)
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise InputError(f"{path}: no such image file or folder")
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not names:
        raise InputError(f"{path}: holds no image ({', '.join(SUFFIXES)})")
    return path, names


class ImageFiles(Dataset[tuple[Tensor, Target]]):
    """Image files as samples with an empty target.

    Args:
        folder: Holds the files.
        names: Paths relative to it.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.file_names = list(names)

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Image uint8 (3, H, W) RGB and its target. Raises InputError where it cannot be decoded."""
        name = self.file_names[index]
        image = torch.from_numpy(read_image(self.folder / name)).permute(2, 0, 1).contiguous()
        empty = Target(
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            difficult=torch.zeros(0, dtype=torch.bool),
            image_id=torch.tensor(index),
            file_name=name,
        )
        return image, empty
