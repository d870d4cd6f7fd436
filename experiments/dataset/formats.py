"""The formats of datasets by name: how files are read, and the data module, which takes long to import."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from datamodules.coco.reader import CocoFormat
from datamodules.dataset_format import DatasetFormat
from datamodules.splits import PARTS, Splits
from datamodules.voc.reader import VOCFormat
from datamodules.yolo.reader import YoloFormat
from detector.errors import InputError, brief
from detector.parts import find_class
from detector.use.reading import USUAL, Reading
from experiments.arguments import DataOptions
from experiments.dataset.data_format import DataFormat, class_of_format, kind_of_format
from experiments.run.parser_errors import cause_of

FORMATS: Final[dict[str, type[DatasetFormat]]] = {kind.name: kind for kind in (VOCFormat, CocoFormat, YoloFormat)}


def data_module_of(data_format: DataFormat) -> Any:
    """Return the class of the data modules of a format; those of ours are in the same folder and named alike.

    Raises:
        InputError: As `own_format`.
    """
    reader = FORMATS.get(kind_of_format(data_format))
    if reader is not None:
        module = import_module(reader.__module__.replace(".reader", ".datamodule"))
        return getattr(module, reader.__name__.replace("Format", "DataModule"))
    new_format = own_format(data_format)
    from datamodules.detection_datamodule import FormatDataModule  # here, because it takes seconds to import

    return type("OwnDataModule", (FormatDataModule,), {"reader": staticmethod(new_format)})


def dataset_format(
    data_format: DataFormat, root: str | Path, image_dirs: Sequence[str] | None = None, reading: Reading = USUAL
) -> DatasetFormat:
    """Return the format that `--data_format` names; root and image_dirs are as for `frcnn fit`.

    Raises:
        InputError: Folders of images are given for a format that has its own places for them, or as `own_format`.
    """
    if data_format == CocoFormat.name:
        return CocoFormat(root, reading=reading, image_dirs=image_dirs)
    if image_dirs is not None:
        raise InputError("--data.image_dirs: is for --data_format coco; others have their own places for images")
    reader = FORMATS.get(kind_of_format(data_format))
    format = reader(root) if reader is not None else own_format(data_format)(root)
    format.read_by(None, reading)
    return format


def own_format(data_format: DataFormat) -> Callable[[str | Path], DatasetFormat]:
    """Return what makes a format of one's own of a root.

    Raises:
        InputError: The class is not there or is none of a format, or refuses the arguments; also when it is called.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    path, given = class_of_format(data_format)
    where = f"--data_format {path}"
    cls = find_class(where, path, DatasetFormat)  # type: ignore[type-abstract]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={"root", "reading"})
    try:
        arguments = parser.parse_object(given).as_dict()
    except ArgumentError as error:
        raise InputError(f"{where}: {cause_of(str(error)).removeprefix('<unicode string>: ')}") from error

    def new_format(root: str | Path) -> DatasetFormat:
        try:
            format = cls(root, **arguments)
        except (TypeError, ValueError, LookupError, OSError) as error:
            raise InputError(f"{where}: {brief(error)}") from error
        format.name = path
        return format

    return new_format


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
