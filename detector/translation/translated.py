"""A whole detector's tensors under our names, and how its class scores and boxes become the model's.

K classes of the file, C of the model, both without background.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.parts import options_of
from detector.roi_heads import RoIConfig, RoIHeads
from detector.use.class_names import VOC_TO_COCO

Predictor = Literal["match", "random", "by_name"]
KEY = "weights"
HEADS = "roi_heads."
LATER = "roi_heads.later."
"""A cascade's further stages, by number, as in `CascadeRoIHeads`."""


@dataclass
class Translated:
    """A foreign detector's tensors under our names.

    Rows are in ratio-major order of the anchors; the predictor has K + 1 rows of scores and (K + 1) * 4 of deltas, with
    the background first and deltas as (dx, dy, dw, dh).

    Attributes:
        tensors: By our names.
        options: What the tensors say of the network: option -> value.
        class_names: Names of classes 1..K where the file is known to have been trained on them.
        norm_eps: What its batch norms add to the variance, where that is known to be unusual.
        delta_std: What its RoI heads' box targets were divided by; torchvision writes it as weights 10, 10, 5, 5.
        delta_mean: What was subtracted from them before.
        later_stds: `delta_std` of a cascade's further stages.
        class_agnostic: Its boxes are those of no class: the sets of deltas of all rows are one.
        coders: `rpn.coder` and `roi.coder`, as in the options of a checkpoint.
        own: It is a checkpoint of this project.
        remark: What a user should know of it.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    class_names: Sequence[str] | None = None
    norm_eps: float | None = None
    delta_std: Sequence[float] = (0.1, 0.1, 0.2, 0.2)
    delta_mean: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    later_stds: Sequence[Sequence[float]] = ()
    class_agnostic: bool = False
    coders: tuple[Any, Any] = ("deltas", "deltas")
    own: bool = False
    remark: str = ""


def adapt_predictor(
    translated: Translated, model: FasterRCNN, class_names: Sequence[str], predictor: Predictor, source: str
) -> str:
    """Keep the rows of the model's classes, if any, with deltas in the model's units; return a remark on that.

    A stage of a cascade that the file does not have begins with what it has for the first one.
    """
    tensors, (first, *later) = translated.tensors, model.roi_heads.stages
    of_first = {name: own for name, own in tensors.items() if name.startswith(HEADS) and LATER not in name}
    for number, stage in enumerate(later):
        prefix, stds = f"{LATER}{number}.", translated.later_stds
        known = f"{prefix}predictor.scores.bias" in tensors
        if not known:
            tensors |= {prefix + name.removeprefix(HEADS): own for name, own in of_first.items()}
        units = replace(translated, delta_std=stds[number] if known and number < len(stds) else translated.delta_std)
        _adapt_stage(units, stage, prefix, class_names, predictor, source)
    return _adapt_stage(translated, first, HEADS, class_names, predictor, source)


def _adapt_stage(
    translated: Translated, stage: RoIHeads, prefix: str, class_names: Sequence[str], predictor: Predictor, source: str
) -> str:
    tensors, config = translated.tensors, stage.config
    same_coder = translated.coders[1] == options_of(config)["coder"]
    names = [f"{prefix}predictor.{layer}.{kind}" for layer in ("scores", "deltas") for kind in ("weight", "bias")]
    classes = len(tensors[f"{prefix}predictor.scores.bias"]) - 1
    theirs = {name: tensors.pop(name).float() for name in names}
    if predictor == "random":
        return "predictor left at random: as asked for"
    if theirs[names[0]].shape[1] != stage.predictor.scores.in_features:
        return "predictor left at random: the file's box head has another width"
    found = _rows_of_classes(translated, classes, class_names, predictor, source)
    remark = _remark(translated, class_names, found, classes, predictor)
    if not found:
        return remark
    for name, current in ((name, stage.get_parameter(name.removeprefix(prefix)).detach()) for name in names):
        if "scores" in name:
            tensors[name] = current.clone()
            tensors[name][[0, *(1 + ours for ours in found)]] = theirs[name][[0, *found.values()]].to(current)
        elif same_coder and (not config.class_agnostic or translated.class_agnostic):
            deltas, mine = _in_units_of(theirs[name], translated, config), current.clone().unflatten(0, (-1, 4))
            if translated.class_agnostic:
                mine[:] = deltas[0].to(current)  # fits any class
            else:
                mine[list(found)] = deltas[list(found.values())].to(current)
            tensors[name] = mine.flatten(0, 1)
    reason = "of classes" if same_coder else "of another roi.coder"
    boxes = "" if names[-1] in tensors else f"boxes of the predictor at random: the file's are {reason}"
    return "; ".join(filter(None, [remark, boxes]))


def _in_units_of(deltas: Tensor, translated: Translated, config: RoIConfig) -> Tensor:
    """Return weights (K + 1, 4, in) or biases (K + 1, 4) that give the same boxes under the model's mean and std.

    A coder of one's own, which both have, knows neither.
    """
    sets: Tensor = deltas.unflatten(0, (-1, 4))
    if config.coder != "deltas":
        return sets
    std = torch.tensor(translated.delta_std) / torch.tensor(config.delta_std)
    sets = sets * std.view(1, 4, *[1] * (deltas.dim() - 1))
    if deltas.dim() == 1:
        sets += (torch.tensor(translated.delta_mean) - torch.tensor(config.delta_mean)) / torch.tensor(config.delta_std)
    return sets


def _rows_of_classes(
    translated: Translated, classes: int, ours: Sequence[str], predictor: Predictor, source: str
) -> dict[int, int]:
    """Return the rows of the file's predictor, where the background is row 0, for our classes, which count from 0.

    Raises:
        InputError: Rows are to be found by name, and the file's classes have none.
    """
    theirs, renamed = list(translated.class_names or ()), [VOC_TO_COCO.get(name, name) for name in ours]
    if predictor == "by_name":
        if not theirs:
            raise InputError(
                f"{KEY}_predictor by_name: {source} does not name its {classes} classes; give match or random"
            )
        known = (name if name in theirs or translated.own else coco for name, coco in zip(ours, renamed, strict=True))
        return {index: 1 + theirs.index(name) for index, name in enumerate(known) if name in theirs}
    for names in (ours, renamed):
        if set(names) <= set(theirs):
            return {index: 1 + theirs.index(name) for index, name in enumerate(names)}
    # In the same order, as far as anybody knows.
    same = classes == len(ours) and not (translated.own and theirs)
    return {index: index + 1 for index in range(classes)} if same else {}


def _remark(
    translated: Translated, ours: Sequence[str], found: Mapping[int, int], classes: int, predictor: Predictor
) -> str:
    """Return a line on the classes that were taken over."""
    if not found and predictor == "by_name":
        return f"predictor left at random: none of the data's classes is among the file's {classes}"
    if not found and translated.own and translated.class_names:
        return f"predictor left at random: not all of the data's classes are among the file's {classes}"
    if not found:
        return f"predictor left at random: the file has {classes} classes, the data {len(ours)}"
    if new := [name for index, name in enumerate(ours) if index not in found]:
        return f"{len(found)} of the data's {len(ours)} classes, by name; at random: {', '.join(new)}"
    return f"{len(found)} of its {classes} classes, by name" if len(found) < classes else ""
