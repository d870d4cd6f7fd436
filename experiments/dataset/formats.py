"""The formats of datasets by name, for commands that need no data module."""

from collections.abc import Sequence
from pathlib import Path

from datamodules.coco.reader import CocoFormat
from datamodules.dataset_format import DatasetFormat
from datamodules.image_reading import USUAL, Reading
from datamodules.voc.reader import VOCFormat
from detector.errors import InputError


def dataset_format(
    data_format: str, root: str | Path, image_dirs: Sequence[str] | None = None, reading: Reading = USUAL
) -> DatasetFormat:
    """Return the format that `--data_format` names; root and image_dirs are as for `frcnn fit`.

    Raises:
        InputError: Folders of images are given for a format that has one place for them.
    """
    if data_format == "coco":
        return CocoFormat(root, reading=reading, image_dirs=image_dirs)
    if image_dirs is not None:
        raise InputError("--data.image_dirs: a dataset in VOC format has its images in JPEGImages/")
    return VOCFormat(root, reading=reading)
