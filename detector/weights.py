"""Pretrained backbone weights: from a file or torchvision's ImageNet checkpoints into our modules, with a report."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from detector.errors import InputError

if TYPE_CHECKING:
    from detector.backbones.base import Backbone, BackboneConfig, BoxHead

KEY = "--model.backbone.weights"

# The first ImageNet release of each network: the one that published detectors start from, and the input normalisation
# (RGB in 0..1, ImageNet mean and std) is the same for all of them.
IMAGENET_WEIGHTS = {
    "vgg16": "VGG16_Weights.IMAGENET1K_V1",
    "vgg16_bn": "VGG16_BN_Weights.IMAGENET1K_V1",
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
    "mobilenet_v2": "MobileNet_V2_Weights.IMAGENET1K_V1",
    "mobilenet_v3_large": "MobileNet_V3_Large_Weights.IMAGENET1K_V1",
}


@dataclass
class WeightsReport:
    """What a set of weights filled in and what it did not.

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
        """One line for a log."""
        total = self.loaded + len(self.missing)
        return (
            f"weights from {self.source}: {self.loaded} of {total} tensors loaded; "
            f"missing: {_shorten(self.missing)}; unexpected: {_shorten(self.unexpected)}"
            + (f"; {self.remark}" if self.remark else "")
        )


def load_backbone_weights(backbone: Backbone, box_head: BoxHead, config: BackboneConfig) -> WeightsReport | None:
    """Copy the weights that `config.weights` names into the two modules, in place.

    Names in the source are those of torchvision's classification networks; `weight_prefixes` of each module says where
    they go.

    Returns None where the configuration asks for random weights.
    Raises InputError for a source that cannot be read or fetched, that fits nowhere, whose shapes differ, or that
    leaves random a tensor which would be frozen.
    """
    if config.random:
        return None
    if config.weights == "imagenet":
        source, state = _fetch_imagenet(config.name)
    else:
        source, state = str(config.weights), read_weights_file(str(config.weights))
    return fill(_backbone_slots(backbone) | _backbone_slots(box_head), source, state)


def read_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a `.pth`, `.pt` or `.safetensors` file, on the CPU.

    A `.pth` or `.pt` holds a state dict, or one under `state_dict` or `model`; no code in it is run.
    Raises InputError for a missing, unreadable or foreign file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{KEY} {path}: no such file; give a .pth, .pt or .safetensors file, 'imagenet' or 'none'")
    if path.suffix == ".ckpt":
        raise InputError(f"{KEY} {path}: give a checkpoint of frcnn fit, which is a whole detector, by --model.weights")
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"{KEY} {path}: the name must end in .pth, .pt or .safetensors, not {path.suffix!r}")
    return read_tensors(path, KEY)


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of an existing file with any name but `.safetensors` for a file of that kind.

    Raises InputError, beginning with the option `key`, for an unreadable or foreign file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        with torch.serialization.safe_globals(_numpy_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{key} {path}: not a readable weights file ({_first_line(error)})") from error
    return _tensors(content, path, key)


def _numpy_numbers() -> list[Any]:
    """What the pickle of a NumPy number calls, under its names in NumPy 1 and 2: checkpoints hold metrics beside
    weights."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = (np.dtype(kind) for kind in (np.float32, np.float64, np.int64))
    return [np.dtype, *((scalar, name) for name in names), *(type(kind) for kind in kinds)]


def _tensors(content: object, path: Path, key: str) -> dict[str, Tensor]:
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{key} {path}: holds no state dict (a mapping of names to tensors)")
    return tensors


def _fetch_imagenet(name: str) -> tuple[str, dict[str, Tensor]]:
    """Read torchvision's ImageNet weights from torch hub's folder, downloading them first where they are not there."""
    family = name.removesuffix("_c4").removesuffix("_fpn")
    if family not in IMAGENET_WEIGHTS:
        raise InputError(f"{KEY} imagenet: none exist for {name}; give a file or 'none'")
    weights = torchvision.models.get_weight(IMAGENET_WEIGHTS[family])
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # URLError and HTTPError are OSErrors; RuntimeError is torch hub's word for a wrong checksum.
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        trouble = f"cannot read {file}" if file.exists() else f"cannot download {weights.url}"
        raise InputError(
            f"{KEY} imagenet: {trouble} ({_first_line(error)}); download {weights.url} elsewhere and put it in "
            f"{file.parent} as {file.name}, or pass the file by {KEY}"
        ) from error
    return f"{weights} ({weights.url})", dict(state)


@dataclass
class Slot:
    """A tensor of ours that a weights file may fill."""

    owner: nn.Module
    tensor: Tensor

    @property
    def frozen(self) -> bool:
        """Whether training never changes it; true of frozen batch norms, which hold buffers and no parameters."""
        return not any(parameter.requires_grad for parameter in self.owner.parameters(recurse=False))


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Name of each tensor of a module -> its slot."""
    return {
        key: Slot(module.get_submodule(key.rpartition(".")[0]), tensor) for key, tensor in module.state_dict().items()
    }


def _backbone_slots(module: Backbone | BoxHead) -> dict[str, Slot]:
    """Name in a weights file -> our tensor, for all that pretrained weights can fill."""
    slots = {}
    for key, slot in slots_of(module).items():
        for theirs, ours in module.weight_prefixes.items():
            if key.startswith(ours):
                slots[theirs + key.removeprefix(ours)] = slot
    return slots


def fill(slots: Mapping[str, Slot], source: str, state: Mapping[str, Tensor], key: str = KEY) -> WeightsReport:
    """Copy the tensors of `state` into the slots of the same names.

    Raises InputError, beginning with the option `key`, if none fits, shapes differ, or a frozen tensor is left random.
    """
    found = [name for name in slots if name in state]
    missing = [name for name in slots if name not in state and not _is_counter(name)]
    unexpected = [name for name in state if name not in slots and not _is_counter(name)]
    _check_fit(slots, state, source, missing, key)
    with torch.no_grad():
        for name in found:
            slots[name].tensor.copy_(state[name])
    return WeightsReport(source, sum(not _is_counter(name) for name in found), missing, unexpected)


def _check_fit(
    slots: Mapping[str, Slot], state: Mapping[str, Tensor], source: str, missing: list[str], key: str
) -> None:
    if not any(name in state and not _is_counter(name) for name in slots):
        raise InputError(
            f"{key}: no tensor of {source} fits this backbone: its first is {min(state, default='none')!r}, "
            f"expected names such as {min(slots)!r}"
        )
    for name, slot in slots.items():
        if name in state and state[name].shape != slot.tensor.shape:
            theirs, ours = tuple(state[name].shape), tuple(slot.tensor.shape)
            raise InputError(f"{key}: {name!r} has shape {theirs} in {source}, but this network needs {ours}")
    random_frozen = [name for name in missing if slots[name].frozen]
    if random_frozen:
        raise InputError(
            f"{key}: {source} lacks {len(random_frozen)} tensors that would be frozen at random values, "
            f"first {random_frozen[0]!r}; train them by --model.backbone.frozen_stages 0 --model.backbone.norm batch, "
            "or give complete weights"
        )


def _is_counter(key: str) -> bool:
    """Batch norm's count of batches: frozen batch norms have none, and old files lack it."""
    return key.endswith("num_batches_tracked")


def _shorten(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
