"""The content of a checkpoint of `frcnn fit`: reading it, and whether it fits a network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from detector.errors import InputError, shortened
from detector.files import check_checkpoint, damage_of, weights_file
from detector.parts import say_strangers
from detector.state_dicts import read_content
from detector.training.resuming import afresh


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `frcnn fit`, or the safetensors of `frcnn export`, or the folder of these.

    Tensors are on the CPU, those of a checkpoint read when they are first used. Which classes of others its options
    name is said; nothing imports them here.

    Raises:
        InputError: The file is missing, damaged, or no such checkpoint; names whole ones beside a damaged one.
    """
    check_checkpoint(path)
    try:
        content = _read(weights_file(path))
    except _DamagedError as error:
        whole = [f"{other.name} (step {content.get('global_step')})" for other, content in _whole(Path(path).parent)]
        raise InputError(f"{error}" + (f"; whole are {', '.join(whole)} beside it" if whole else "")) from error
    say_strangers(path, content["hyper_parameters"])
    return content


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint in a folder that a training has come furthest in, and say which others are damaged.

    Raises:
        InputError: All that there are are damaged.
    """
    damaged: list[str] = []
    whole = _whole(folder, damaged)
    if damaged and not whole:
        raise InputError(f"{damaged[0]}; there is no whole checkpoint in {folder}")
    for line in damaged:
        rank_zero_warn(f"{line}; going on from {whole[0][0].name}")
    return whole[0][0] if whole else None


class _DamagedError(InputError):
    pass


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        content = dict(read_content(path, "weights"))
        if "hyper_parameters" not in content:
            raise InputError(f"{path}: holds weights alone; give a file of frcnn export --format safetensors")
        state = {f"model.{name}": value for name, value in content.items() if isinstance(value, Tensor)}
        return content | {"state_dict": state}
    if damage := damage_of(path):
        raise _DamagedError(f"{path}: is damaged: {damage}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise _DamagedError(f"{path}: not a readable checkpoint of frcnn fit ({type(error).__name__})") from error
    kinds = {"hyper_parameters": Mapping, "state_dict": Mapping, "pytorch-lightning_version": str}
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in kinds):
        raise InputError(f"{path}: not a checkpoint of frcnn fit (it lacks one of {', '.join(kinds)})")
    for key, kind in kinds.items():
        if not isinstance(checkpoint[key], kind):
            raise InputError(f"{path}: not a checkpoint of frcnn fit ({key} is a {type(checkpoint[key]).__name__})")
    if wrong := next((name for name, value in checkpoint["state_dict"].items() if not isinstance(value, Tensor)), None):
        raise InputError(f"{path}: not a checkpoint of frcnn fit (state_dict.{wrong} is no tensor)")
    return checkpoint


def _whole(folder: Path, damaged: list[str] | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Return the whole checkpoints in a folder with their contents, that of most steps first; tell of the others."""
    found = []
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: (path.name != "last.ckpt", path.name)):
        try:
            found.append((path, _read(path)))
        except InputError as error:
            if damaged is not None:
                damaged.append(str(error))
    return sorted(found, key=lambda pair: -int(pair[1].get("global_step") or 0))


def bit_depth_of(checkpoint: Mapping[str, Any]) -> int:
    """Return the bit depth of the images that a checkpoint was trained on.

    Raises:
        InputError: What it says is none.
    """
    data = checkpoint.get("datamodule_hyper_parameters", {})
    told = data.get("bit_depth", 16) if isinstance(data, Mapping) else data
    if told not in range(8, 17):
        raise InputError(f"the checkpoint's bit_depth {shortened(str(told))}: must be in 8..16")
    return int(told)


def check_bit_depth(path: str | Path, checkpoint: Mapping[str, Any], reading: Any) -> None:
    """Raise InputError if a checkpoint was trained on images of another bit depth than those of `reading`, if any."""
    theirs = bit_depth_of(checkpoint)
    if reading is not None and reading.bit_depth != theirs:
        raise InputError(
            f"{path}: was trained with bit_depth {theirs}, but now it is {reading.bit_depth}; give the checkpoint's"
        )


def check_classes(path: object, checkpoint: Mapping[str, Any], ours: Sequence[str]) -> None:
    """Raise InputError if a checkpoint was trained on other classes, or on the same ones in another order."""
    theirs = checkpoint.get("hyper_parameters", {}).get("class_names", ours)
    if theirs != ours:
        raise InputError(
            f"{path}: was trained on {len(theirs)} classes ({', '.join(theirs)}), but the data has "
            f"{len(ours)} classes ({', '.join(ours)}); "
            f"give the checkpoint's by data.class_names, or {afresh(path)}, with weights_predictor by_name"
        )


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
