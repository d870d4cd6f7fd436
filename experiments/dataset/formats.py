"""The formats of datasets by name: how files are read, and the data module, which takes long to import."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from datamodules.coco.reader import CocoFormat
from datamodules.dataset_format import DatasetFormat
from datamodules.splits import PARTS, Splits
from datamodules.voc.reader import VOCFormat
from datamodules.yolo.reader import YoloFormat
from detector.errors import InputError
from detector.use.reading import USUAL, Reading
from experiments.arguments import DataOptions

FORMATS: Final[dict[str, type[DatasetFormat]]] = {kind.name: kind for kind in (VOCFormat, CocoFormat, YoloFormat)}


def data_module_of(data_format: str) -> Any:
    """Return the class of the data modules of a format, which are in the same folder and named alike."""
    reader = FORMATS[data_format]
    module = import_module(reader.__module__.replace(".reader", ".datamodule"))
    return getattr(module, reader.__name__.replace("Format", "DataModule"))


def dataset_format(
    data_format: str, root: str | Path, image_dirs: Sequence[str] | None = None, reading: Reading = USUAL
) -> DatasetFormat:
    """Return the format that `--data_format` names; root and image_dirs are as for `frcnn fit`.

    Raises:
        InputError: Folders of images are given for a format that has its own places for them.
    """
    if data_format == CocoFormat.name:
        return CocoFormat(root, reading=reading, image_dirs=image_dirs)
    if image_dirs is not None:
        raise InputError(f"--data.image_dirs: is for --data_format coco; {data_format} has its own places for images")
    return FORMATS[data_format](root, reading=reading)


def made_splits(format: DatasetFormat, data: DataOptions) -> Splits | None:
    """Return the splits that `--data.val_fraction` makes; None without it.

    Raises:
        InputError: The values contradict each other.
    """
    names = {part: getattr(data, f"{part}_splits") or [] for part in PARTS}
    return None if data.val_fraction is None else Splits(format, names, data.val_fraction, data.split_seed)


def lists_beside(config: Any) -> list[Path]:
    """Return where the runs whose config files were read keep the lists of their made splits."""
    return [Path(str(file)).parent / "splits" for file in config.get("config") or []]
