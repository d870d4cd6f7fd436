"""The way of a weights file's tensors into modules, by name, with a report of what they filled."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from detector.errors import InputError, listed
from detector.files import damage_of

KEY = "backbone.weights"


@dataclass
class WeightsReport:
    """What a set of weights filled in, and what it did not.

    Attributes:
        source: The file, or the name of the torchvision weights with their address.
        loaded: Number of tensors copied into the network (batch counters are not counted).
        missing: Tensors of ours, by their name in a weights file, that the source lacks; they keep their random values.
        unexpected: Tensors of the source that have no place here, such as the ImageNet classifier.
        remark: What else a user should know, such as classes that were taken over by name.
    """

    source: str
    loaded: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    remark: str = ""

    def summary(self) -> str:
        """Return one line for a log."""
        total = self.loaded + len(self.missing)
        return (
            f"weights from {self.source}: {self.loaded} of {total} tensors loaded; "
            f"missing: {listed(self.missing, 6) or 'none'}; unexpected: {listed(self.unexpected, 6) or 'none'}"
            + (f"; {self.remark}" if self.remark else "")
        )


def read_content(path: Path, key: str) -> Mapping[str, Any]:
    """Read an existing file: of safetensors where its name ends so, else a pickle without code; {} if no mapping.

    The options that `frcnn export` writes into a file of safetensors are its "hyper_parameters", as in a checkpoint.

    Raises:
        InputError: Beginning with the option `key`, for an unreadable file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu") | _options_in(path)
        if damage := damage_of(path):
            raise ValueError(f"it is damaged: {damage}")
        with torch.serialization.safe_globals(_numpy_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{key} {path}: not a readable weights file ({first_line(error)})") from error
    return content if isinstance(content, Mapping) else {}


def _options_in(path: Path) -> dict[str, Any]:
    """Return what the metadata of safetensors say of a detector, under the names of a checkpoint."""
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("frcnn")
    if about is None:
        return {}
    try:
        told = json.loads(about)
        options = {**told["options"], "class_names": told["class_names"], "training_scheme": "joint"}
        data = {"bit_depth": told["bit_depth"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"its metadata are damaged: {error}") from error
    return {"hyper_parameters": options, "datamodule_hyper_parameters": data, "global_step": told.get("step")}


def _numpy_numbers() -> list[Any]:
    """Return what the pickle of a NumPy number calls, in NumPy 1 and 2: checkpoints hold metrics beside weights."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = (np.dtype(kind) for kind in (np.float32, np.float64, np.int64))
    return [np.dtype, *((scalar, name) for name in names), *(type(kind) for kind in kinds)]


def tensors_in(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Return the state dict that is the content of a file, or is in it; InputError begins with `source`."""
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{source}: holds no state dict (a mapping of names to tensors)")
    return tensors


@dataclass
class Slot:
    """A tensor of a network, by its name there, that a weights file may fill."""

    network: nn.Module
    name: str
    tensor: Tensor

    @property
    def frozen(self) -> bool:
        """Return whether training never changes it, as in frozen batch norms, which hold buffers and no parameters."""
        owner = self.network.get_submodule(self.name.rpartition(".")[0])
        return not any(parameter.requires_grad for parameter in owner.parameters(recurse=False))


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Return the slots of all tensors of a module by their names."""
    return {key: Slot(module, key, tensor) for key, tensor in module.state_dict().items()}


def fill(slots: Mapping[str, Slot], source: str, state: Mapping[str, Tensor], key: str = KEY) -> WeightsReport:
    """Copy the tensors of `state` into the slots of the same names.

    Raises:
        InputError: Beginning with `key`: none fits, shapes differ, or a frozen tensor is left random.
    """
    found = {name: slot for name, slot in slots.items() if name in state}
    counted = sum(not _is_counter(name) for name in found)
    if not counted:
        raise InputError(
            f"{key}: no tensor of {source} fits this backbone: its first is {min(state, default='none')!r}, "
            f"expected names such as {min(slots)!r}"
        )
    for name, slot in found.items():
        theirs, ours = tuple(state[name].shape), tuple(slot.tensor.shape)
        if theirs != ours:
            raise InputError(f"{key}: {name!r} has shape {theirs} in {source}, but this network needs {ours}")
    missing = [name for name in slots if name not in state and not _is_counter(name)]
    if random_frozen := [name for name in missing if slots[name].frozen]:
        raise InputError(
            f"{key}: {source} lacks {len(random_frozen)} tensors that would be frozen at random values, "
            f"first {random_frozen[0]!r}; train them by backbone.frozen_stages 0 and backbone.norm batch, or give "
            "complete weights"
        )
    for network in {slot.network for slot in found.values()}:
        own = {slot.name: state[name] for name, slot in found.items() if slot.network is network}
        network.load_state_dict(own, strict=False)
    unexpected = [name for name in state if name not in slots and not _is_counter(name)]
    return WeightsReport(source, counted, missing, unexpected)


def _is_counter(key: str) -> bool:
    """Return whether it is batch norm's count of batches, which frozen batch norms and old files lack."""
    return key.endswith("num_batches_tracked")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
