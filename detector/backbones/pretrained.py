"""Pretrained weights of backbones: ImageNet checkpoints of torchvision or timm, or a file in their names."""

import hashlib
import pickle
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from detector.backbones.base import IMAGENET, Backbone, BackboneConfig, BackboneName, BackbonePart
from detector.backbones.box_heads import BoxHead
from detector.backbones.timm_models import library, timm_model
from detector.errors import InputError
from detector.parts import name_of
from detector.state_dicts import KEY, Slot, WeightsReport, fill, first_line, read_content, slots_of, tensors_in


def load_backbone_weights(backbone: Backbone, box_head: BoxHead, config: BackboneConfig) -> WeightsReport | None:
    """Copy the weights that `config.weights` names into the two modules, in place.

    Names in the source are those of torchvision's or timm's classification networks; `weight_prefixes` of each module
    says where they go.

    Returns None where the configuration asks for random weights.
    Raises InputError for a source that cannot be read or fetched, that fits nowhere, whose shapes differ, or that
    leaves random a tensor which would be frozen.
    """
    if config.random:
        return None
    if config.weights not in IMAGENET:
        source, state = str(config.weights), read_weights_file(str(config.weights))
    elif isinstance(config.name, BackbonePart):
        source, state = name_of(config.name), dict(config.name.imagenet_weights())
    elif config.name == "timm":
        source, state = _fetch_from_timm(config)
    else:
        source, state = _fetch_imagenet(config.name, config.weights)
    if config.norm == "group" and any(name.endswith("running_mean") for name in state):
        raise InputError(f"{KEY} {source}: has batch norm, and backbone.norm is group; give frozen, batch or sync")
    report = fill(_backbone_slots(backbone) | _backbone_slots(box_head), source, state)
    if config.name == "timm":
        known = timm_model(config.model, config.levels)
        report.remark = f"they were trained with image.mean {known.mean}, image.std {known.std}"
    return report


def read_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a `.pth`, `.pt` or `.safetensors` file, on the CPU.

    A `.pth` or `.pt` holds a state dict, or one under `state_dict` or `model`; no code in it is run.
    Raises InputError for a missing, unreadable or foreign file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(
            f"{KEY} {path}: no such file; give a .pth, .pt or .safetensors file, 'imagenet', 'imagenet_v2' or 'none'"
        )
    if path.suffix == ".ckpt":
        raise InputError(f"{KEY} {path}: give a checkpoint of frcnn fit, which is a whole detector, by the key weights")
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"{KEY} {path}: the name must end in .pth, .pt or .safetensors, not {path.suffix!r}")
    return tensors_in(read_content(path, KEY), f"{KEY} {path}")


def _fetch_imagenet(name: BackboneName, release: str) -> tuple[str, dict[str, Tensor]]:
    """Read torchvision's ImageNet weights from torch hub's folder, downloading them first where they are not there.

    The input normalisation (RGB in 0..1, ImageNet mean and std) is the same for all of them.
    """
    every = torchvision.models.get_model_weights(name.removesuffix("_c4").removesuffix("_fpn"))
    weights = every[f"IMAGENET1K_V{IMAGENET[release]}"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    advice = f"download {weights.url} elsewhere and put it in {file.parent} as {file.name}, or pass the file by {KEY}"
    try:
        found_there = file.exists()
        if found_there and not _sha256(file).startswith(file.stem.rpartition("-")[2]):
            raise InputError(f"{KEY} {release}: {file} is damaged, its SHA-256 is not that of its name; {advice}")
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # URLError and HTTPError are OSErrors; RuntimeError is torch hub's word for a wrong checksum.
        trouble = f"cannot read {file}" if found_there else f"cannot download {weights.url}"
        raise InputError(f"{KEY} {release}: {trouble} ({first_line(error)}); {advice}") from error
    return f"{weights} ({weights.url})", dict(state)


def _fetch_from_timm(config: BackboneConfig) -> tuple[str, dict[str, Tensor]]:
    """Read the weights that timm publishes for a model from its cache, downloading them first where they are not."""
    published, address = timm_model(config.model, config.levels).published
    try:
        network = library().create_model(config.model, pretrained=True)
    except Exception as error:  # of timm, of the hub, and of whichever library that downloads by
        raise InputError(
            f"{KEY} {config.weights}: timm cannot read or download {published} ({first_line(error)}); download "
            f"{address} elsewhere and pass the file by {KEY}"
        ) from error
    return f"timm's {published} ({address})", network.state_dict()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _backbone_slots(module: Backbone | BoxHead) -> dict[str, Slot]:
    """Name in a weights file -> our tensor, for all that pretrained weights can fill."""
    slots = {}
    for key, slot in slots_of(module).items():
        for theirs, ours in module.weight_prefixes.items():
            if key.startswith(ours):
                slots[theirs + key.removeprefix(ours)] = slot
    return slots
