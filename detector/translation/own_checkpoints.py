"""Checkpoints of `frcnn fit` as a start for another training: everything that fits, under other classes or anchors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, cat, zeros_like

from detector.anchors import AnchorConfig, base_anchors
from detector.cascade import stage_stds
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.parts import options_of
from detector.translation.translated import Translated

RPN_OUTPUTS = tuple(f"rpn.head.{name}.{kind}" for name in ("objectness", "deltas") for kind in ("weight", "bias"))
RPN_DELTAS = "rpn.head.deltas."
PREDICTOR, SCORES = "roi_heads.predictor.", "scores.bias"
OURS = f"{PREDICTOR}{SCORES}", RPN_OUTPUTS[0]  # an RPN head of one's own has other names


def is_own(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is of this project's module, or of its network."""
    return any(f"{prefix}{name}" in state for prefix in ("model.", "") for name in OURS)


def translate_own(
    state: Mapping[str, Tensor], model: FasterRCNN, options: Mapping[str, Any], source: str
) -> Translated:
    """Return a checkpoint's tensors without those that the model has in another shape.

    `options` are those of its training, empty where they are not known; `source` is the file and its key, for messages.

    Raises:
        InputError: It is of another backbone, or of an alternating training that has no single network yet.
    """
    if any(name.startswith("alternating.proposer.") for name in state):
        raise InputError(
            f"{source}: is of step 1 or 2 of an alternating training; up to the end of step 2 there is no single "
            "network to begin with"
        )
    prefix = "model." if any(f"model.{name}" in state for name in OURS) else ""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check_backbone(tensors, shapes, options, source)
    remark = _sort_anchors(tensors, model, options)
    predictors = sorted(name.removesuffix(SCORES) for name in tensors if name.endswith(SCORES))[::-1]  # of all stages
    for name in [*tensors]:
        adapted = name.startswith((*predictors, *RPN_OUTPUTS))
        if not adapted and name in shapes and shapes[name] != tensors[name].shape:
            del tensors[name]
    config = model.roi_heads.config
    units = {key: getattr(config, key) for key in ("delta_std", "delta_mean", "cascade_delta_std")}
    roi = units | options.get("roi", {})
    coders = [
        options.get(part, ours).get("coder", "deltas")
        for part, ours in (("rpn", options_of(model.rpn.config)), ("roi", options_of(config)))
    ]
    agnostic, *_ = (_spread_deltas(tensors, own, bool(roi.get("class_agnostic"))) for own in predictors)
    stds = stage_stds(roi["delta_std"], roi["cascade_delta_std"], len(predictors))
    return Translated(
        tensors,
        {},
        options.get("class_names"),
        options.get("backbone", {}).get("norm_eps"),
        roi["delta_std"],
        roi["delta_mean"],
        stds[1:],
        agnostic,
        (coders[0], coders[1]),
        own=True,
        remark=remark,
    )


def _check_backbone(
    theirs: Mapping[str, Tensor], shapes: Mapping[str, Any], options: Mapping[str, Any], source: str
) -> None:
    for name, shape in shapes.items():
        same = name in theirs and theirs[name].shape == shape
        if name.startswith("backbone.") and not (same or name.endswith("num_batches_tracked")):
            kind = options.get("backbone", {}).get("name")
            raise InputError(
                f"{source}: is of another backbone{f', {kind}' if kind else ''}: {name} is "
                f"{tuple(theirs[name].shape) if name in theirs else 'missing'} there and {tuple(shape)} here; give "
                "the options of backbone of its run"
            )


def _sort_anchors(tensors: dict[str, Tensor], model: FasterRCNN, options: Mapping[str, Any]) -> str:
    """Bring the RPN's outputs into ratio-major order, or leave them out where they are for another number of anchors.

    Returns:
        What a user should know of the anchors that the RPN was trained for.
    """
    config = model.rpn.anchor_generator.config
    given = AnchorConfig(**options["anchors"]) if "anchors" in options else None
    outputs = {name for name in tensors if name.startswith(("rpn.head.objectness.", RPN_DELTAS))}
    wanted = {f"rpn.head.{name}" for name in model.rpn.head.state_dict() if name.startswith(("objectness.", "deltas."))}
    if outputs != set(RPN_OUTPUTS) or wanted != outputs:  # numbers of anchors differ between levels
        if outputs == wanted and given in (None, config):
            return ""
        for name in outputs:
            del tensors[name]
        return "RPN's outputs left at random: their levels have other anchors"
    theirs = base_anchors(given) if given else None
    ours = base_anchors(replace(config, order="ratio_major"))
    count = len(tensors[RPN_OUTPUTS[-1]]) // 4
    if count != len(ours):
        for name in RPN_OUTPUTS:
            del tensors[name]
        there = f"{count} anchors per location there, {len(ours)} here"
        return "" if theirs is None else f"RPN's outputs left at random: {there}"
    known = [] if theirs is None else _order(theirs, ours)
    order = known or _order(base_anchors(config), ours)  # if not known, they are as ours
    for name in RPN_OUTPUTS:
        tensors[name] = tensors[name].unflatten(0, (count, -1))[order].flatten(0, 1)
    return "" if theirs is None or known else "its RPN was trained for other anchors"


def _order(theirs: Tensor, ours: Tensor) -> list[int]:
    """Return for each of our anchors the position of theirs that is the same; none if one has none."""
    equal = (ours[:, None] - theirs[None]).abs().amax(2) < 1e-3
    return equal.int().argmax(1).tolist() if bool(equal.any(1).all()) else []


def _spread_deltas(tensors: dict[str, Tensor], predictor: str, class_agnostic: bool) -> bool:
    """Let a predictor have one set of deltas per class, background first, and return whether it had one for all."""
    rows = len(tensors[f"{predictor}scores.bias"])
    agnostic = len(tensors[f"{predictor}deltas.bias"]) == 4 and (rows > 2 or class_agnostic)
    for name in (f"{predictor}deltas.weight", f"{predictor}deltas.bias"):
        deltas = tensors[name]
        spread = deltas.repeat(rows, *[1] * (deltas.dim() - 1))
        tensors[name] = spread if agnostic else cat((zeros_like(deltas[:4]), deltas))
    return agnostic
