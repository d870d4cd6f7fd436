"""Which data module a command works with: known before its options can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import yaml

from datamodules.coco.datamodule import CocoDataModule
from datamodules.detection_datamodule import DetectionDataModule
from datamodules.voc.datamodule import VOCDataModule
from detector.errors import InputError

DATA_FORMATS: Final[dict[str, type[DetectionDataModule]]] = {"voc": VOCDataModule, "coco": CocoDataModule}


def find_data_format(arguments: Sequence[str]) -> str:
    """The format that a command line asks for by `--data_format`, or else the last of its config files by
    `data_format:`; "voc" where neither does.

    Raises:
        InputError: There is no such format.
    """
    parts = [part for argument in arguments for part in (argument.split("=", 1) if argument[:1] == "-" else [argument])]
    given = list(pairwise(parts))
    found = "voc"
    for option, value in given:
        if option in ("--config", "-c"):
            found = _in_file(value) or found
    for option, value in given:
        if option == "--data_format":
            found = value
    if found not in DATA_FORMATS:
        raise InputError(f"--data_format {found}: there are {' and '.join(DATA_FORMATS)}")
    return found


def _in_file(name: str) -> str | None:
    """A file that cannot be read is the parser's to complain about."""
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    value = content.get("data_format") if isinstance(content, dict) else None
    return None if value is None else str(value)
