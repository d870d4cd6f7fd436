"""What `--data_format` says: one of ours by name, or one's own by class path. Imports nothing slow."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from detector.errors import InputError

DataFormat = str | dict[str, object]
"""One of ours by its name, one's own by its class path, or a mapping of `class_path` and `init_args`."""
FORMAT_NAMES: Final = ("voc", "coco", "yolo")


@dataclass(frozen=True, kw_only=True)
class DataFormatOptions:
    """The format of a dataset.

    Args:
        data_format: Format of the dataset, which decides what --data options there are: voc (XML), coco (JSON), yolo
            (text files), or the class path of one's own (datamodules.own_format): my_package.MyFormat, with
            --data_format.ARGUMENT VALUE where it takes more than a root.
    """

    data_format: DataFormat = "voc"


def class_of_format(data_format: DataFormat) -> tuple[str, dict[str, Any]]:
    """Return the name of a format of ours, or the class path of one's own, and the arguments that it is given.

    Raises:
        InputError: It is neither.
    """
    spec: Mapping[str, Any] = data_format if isinstance(data_format, dict) else {"class_path": data_format}
    path, given = str(spec.get("class_path")), spec.get("init_args") or {}
    if path not in FORMAT_NAMES and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
        names = ", ".join(FORMAT_NAMES)
        raise InputError(f"--data_format {path}: there are {names}, and one's own by class path: my_package.MyFormat")
    if not isinstance(given, Mapping):
        raise InputError(f"--data_format {path}: init_args is {given!r}; it must map names to values")
    return path, dict(given)


def kind_of_format(data_format: DataFormat) -> str:
    """Return the name of a format of ours, or "own"."""
    name, _ = class_of_format(data_format)
    return name if name in FORMAT_NAMES else "own"
