"""The content of a checkpoint of `frcnn fit`: reading it, and whether it fits a network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.errors import InputError
from detector.files import check_checkpoint
from detector.training.resuming import afresh


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `frcnn fit`; its tensors are on the CPU and read when they are first used.

    Raises:
        InputError: The file is missing, unreadable, or no such checkpoint.
    """
    check_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint of frcnn fit ({type(error).__name__})") from error
    keys = ("hyper_parameters", "state_dict", "pytorch-lightning_version")
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in keys):
        raise InputError(f"{path}: not a checkpoint of frcnn fit (it lacks one of {', '.join(keys)})")
    return checkpoint


def bit_depth_of(checkpoint: Mapping[str, Any]) -> int:
    """Return the bit depth of the images that a checkpoint was trained on."""
    return int(checkpoint.get("datamodule_hyper_parameters", {}).get("bit_depth", 16))


def check_state(path: str | Path, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Raise InputError unless both have the same tensor names and shapes."""
    differing = [
        f"{key} is {_shape(theirs.get(key))} there and {_shape(ours.get(key))} here"
        for key in [*ours, *(key for key in theirs if key not in ours)]
        if _shape(theirs.get(key)) != _shape(ours.get(key))
    ]
    if differing:
        more = f", and {len(differing) - 1} more tensors differ" if len(differing) > 1 else ""
        raise InputError(
            f"{path}: is of another network than the options of the model: {differing[0]}{more}; give the options of "
            f"its run, or {afresh(path)}"
        )


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape)) or "a number"
