"""Checkpoints of `frcnn fit` as a start for another training: everything that fits, under other classes or anchors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detector.anchors import AnchorConfig, base_anchors
from detector.errors import InputError

if TYPE_CHECKING:
    from detector.faster_rcnn import FasterRCNN

FIRST_LAYERS = "backbone."
RPN_OUTPUTS = tuple(f"rpn.head.{name}.{kind}" for name in ("objectness", "deltas") for kind in ("weight", "bias"))
PREDICTOR = "roi_heads.predictor."


def is_own(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is of this project's module, or of its network."""
    return any(prefix + RPN_OUTPUTS[0] in state for prefix in ("model.", ""))


def options_of(path: Path) -> dict[str, Any]:
    """Return the options of the model in a checkpoint; empty for a file of weights alone."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):  # such as a .safetensors
        return {}
    options = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    return dict(options) if isinstance(options, Mapping) else {}


def own_tensors(
    state: Mapping[str, Tensor], model: FasterRCNN, options: Mapping[str, Any], source: str
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the names of `FasterRCNN`, without those that this one has in another shape.

    The RPN's outputs are in ratio-major order of the model's anchors, if they are for as many.

    Args:
        state: As the file has it; averaged weights where the training averaged them.
        model: The detector that is to begin with them.
        options: Of the training; empty where they are not known.
        source: The file and its option, for messages.

    Raises:
        InputError: It is of another backbone, or of an alternating training that has no single network yet.
    """
    if any(name.startswith("alternating.proposer.") for name in state):
        raise InputError(
            f"{source}: is of step 1 or 2 of an alternating training; up to the end of step 2 there is no single "
            "network to begin with"
        )
    prefix = "model." if "model." + RPN_OUTPUTS[0] in state else ""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        same = name in tensors and tensors[name].shape == shape
        if name.startswith(FIRST_LAYERS) and not (same or name.endswith("num_batches_tracked")):
            theirs = options.get("backbone", {}).get("name")
            raise InputError(
                f"{source}: is of another backbone{f', {theirs}' if theirs else ''}: {name} is "
                f"{tuple(tensors[name].shape) if name in tensors else 'missing'} there and {tuple(shape)} here; give "
                "the --model.backbone options of its run"
            )
    _sort_anchors(tensors, model, options)
    of_other_shape = [
        name
        for name, tensor in tensors.items()
        if name in shapes and shapes[name] != tensor.shape and not name.startswith((PREDICTOR, *RPN_OUTPUTS))
    ]
    return {name: tensor for name, tensor in tensors.items() if name not in of_other_shape}


def anchor_remark(model: FasterRCNN, options: Mapping[str, Any]) -> str:
    """Say what a user should know of the anchors that the checkpoint's RPN was trained for."""
    theirs, ours = _anchors(options), base_anchors(_ratio_major(model))
    if theirs is None:
        return ""
    if len(theirs) != len(ours):
        return f"RPN's outputs left at random: {len(theirs)} anchors per location there, {len(ours)} here"
    return "" if _order(theirs, ours) is not None else "its RPN was trained for other anchors"


def own_predictor(tensors: dict[str, Tensor], class_agnostic: bool) -> None:
    """Bring the deltas into the layout of `Translated`: one set per class, background first; in place."""
    for kind in ("weight", "bias"):
        deltas, rows = tensors[f"{PREDICTOR}deltas.{kind}"], len(tensors[f"{PREDICTOR}scores.{kind}"])
        if class_agnostic:
            tensors[f"{PREDICTOR}deltas.{kind}"] = deltas.repeat(rows, *[1] * (deltas.dim() - 1))
        else:
            tensors[f"{PREDICTOR}deltas.{kind}"] = torch.cat((torch.zeros_like(deltas[:4]), deltas))


def _sort_anchors(tensors: dict[str, Tensor], model: FasterRCNN, options: Mapping[str, Any]) -> None:
    theirs, ours = _anchors(options), base_anchors(_ratio_major(model))
    count = len(tensors[RPN_OUTPUTS[-1]]) // 4
    if count != len(ours):
        for name in RPN_OUTPUTS:
            del tensors[name]
        return
    order = _order(theirs, ours) if theirs is not None else None
    if order is None:
        order = list(range(count))
        if model.rpn.anchor_generator.config.order == "scale_major":  # as they are: what follows sorts them so
            mine = base_anchors(model.rpn.anchor_generator.config)
            order = _order(mine, ours) or order
    for name in RPN_OUTPUTS:
        tensors[name] = tensors[name].unflatten(0, (count, -1))[order].flatten(0, 1)


def _anchors(options: Mapping[str, Any]) -> Tensor | None:
    return base_anchors(AnchorConfig(**options["anchors"])) if "anchors" in options else None


def _ratio_major(model: FasterRCNN) -> AnchorConfig:
    return replace(model.rpn.anchor_generator.config, order="ratio_major")


def _order(theirs: Tensor, ours: Tensor) -> list[int] | None:
    """Return for each of our anchors the position of theirs that is the same; None where one has none."""
    equal = (ours[:, None] - theirs[None]).abs().amax(2) < 1e-3
    return equal.int().argmax(1).tolist() if bool(equal.any(1).all()) else None
