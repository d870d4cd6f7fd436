"""Whole detectors of other code bases, torchvision's and chenyuntc/simple-faster-rcnn-pytorch's, as ours.

Checkpoints of this project, by `own_checkpoints`, go the same way.

A layout is recognised by its tensors' names. `translate` gives the tensors our names; `_adapt_anchors` and
`adapt_predictor` then bring their rows into the order that the options ask for, so that all that remains is copying.

A anchors per location, C classes of the model, K classes of the file, both without background.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detector.backbones.base import BackboneConfig
from detector.errors import InputError, value_text
from detector.faster_rcnn import FasterRCNN
from detector.files import weights_file
from detector.parts import options_of
from detector.rpn import RPNHead
from detector.state_dicts import WeightsReport, fill, read_content, slots_of, tensors_in
from detector.training.finite import check_finite
from detector.translation.own_checkpoints import is_own, translate_own
from detector.translation.translated import KEY, Predictor, Translated, adapt_predictor
from detector.use.class_names import VOC_CLASSES

ANCHORS = "anchors per location (anchors.scales x anchors.aspect_ratios, or anchors.sizes)"

# The ids 1 to 90 of COCO's 80 classes; the others were never used.
_CATEGORIES: list[str] = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_NAMES = ["" if name == "N/A" else name for name in _CATEGORIES[1:]]
_YXHW_TO_XYWH = [1, 0, 3, 2]


def load_detector(
    model: FasterRCNN, backbone: BackboneConfig, class_names: Sequence[str], path: str | Path, predictor: Predictor
) -> WeightsReport:
    """Copy the weights of a foreign detector, or of a checkpoint of this project, into `model`, in place.

    Args:
        model: A detector of one of the layouts' networks; of a checkpoint's backbone.
        backbone: The options that its backbone was built from.
        class_names: Of classes 1..C.
        path: State dict in a file, or in a checkpoint under `model` or `state_dict`; no code in it is run.
        predictor: What becomes of the file's class scores and boxes; see `FasterRCNNModule`.

    Raises:
        InputError: The file is missing, unreadable, of no known layout, or of another network than the options'; then
            the message names the options that would fit.
    """
    path = weights_file(Path(path).expanduser())
    if not path.is_file():
        raise InputError(f"{KEY} {path}: no such file; give a detector's state dict, such as torchvision's .pth files")
    if predictor not in get_args(Predictor):
        raise InputError(f"{KEY}_predictor {predictor}: choose one of {', '.join(get_args(Predictor))}")
    source = f"{KEY} {path}"
    content = read_content(path, KEY)
    state, options = tensors_in(content, source), content.get("hyper_parameters", {})
    check_finite(source, state)
    try:
        own = is_own(state)
        translated = translate_own(state, model, options, source) if own else translate(state, str(path))
        ours = _options_of(model, backbone)
        differing = [
            f"{key} {value_text(value)} (is {value_text(ours[key])})"
            for key, value in translated.options.items()
            if value != ours[key]
        ]
        if differing:
            raise InputError(f"{KEY} {path}: its network needs {', '.join(differing)}")
        _adapt_anchors(translated.tensors, model)
        remarks = [adapt_predictor(translated, model, class_names, predictor, source), translated.remark]
        if translated.coders[0] != options_of(model.rpn.config)["coder"]:
            for name in [name for name in translated.tensors if name.startswith("rpn.head.deltas.")]:
                del translated.tensors[name]
            remarks.append("boxes of the RPN at random: the file's are of another rpn.coder")
    except KeyError as error:
        raise InputError(f"{source}: is incomplete: it lacks what would be our {error}") from error
    if translated.norm_eps not in (None, backbone.norm_eps):
        remarks.append(f"its batch norms were trained with backbone.norm_eps {translated.norm_eps:g}")
    report = fill(slots_of(model), str(path), translated.tensors, KEY)
    report.remark = "; ".join(filter(None, remarks))
    return report


def translate(state: Mapping[str, Tensor], source: str) -> Translated:
    """Recognise the layout of a state dict and translate it; InputError if it is of none, or its backbone not ours."""
    if "rpn.head.cls_logits.weight" in state and "roi_heads.box_predictor.cls_score.weight" in state:
        return _translate_torchvision(state, source)
    if "extractor.0.weight" in state and "rpn.score.weight" in state and "head.cls_loc.weight" in state:
        return _translate_chenyuntc(state)
    raise InputError(
        f"{KEY} {source}: is no detector of a known layout: its first tensor is {min(state)!r}; known are checkpoints "
        "of frcnn fit, torchvision's Faster R-CNNs (rpn.head.cls_logits.weight, ...) and "
        "chenyuntc/simple-faster-rcnn-pytorch's (extractor.0.weight, ...); weights of a classification network go to "
        "backbone.weights"
    )


_TORCHVISION = {
    "rpn.head.conv.": "rpn.head.conv.",
    "rpn.head.cls_logits.": "rpn.head.objectness.",
    "rpn.head.bbox_pred.": "rpn.head.deltas.",
    "roi_heads.box_head.fc6.": "roi_heads.box_head.fc1.",
    "roi_heads.box_head.fc7.": "roi_heads.box_head.fc2.",
    "roi_heads.box_head.5.": "roi_heads.box_head.fc.",  # after four convolutions and a flattening
    "roi_heads.box_head.": "roi_heads.box_head.convs.",
    "roi_heads.box_predictor.cls_score.": "roi_heads.predictor.scores.",
    "roi_heads.box_predictor.bbox_pred.": "roi_heads.predictor.deltas.",
}
_CHENYUNTC = {
    "extractor.": "backbone.body.features.",
    "rpn.conv1.": "rpn.head.conv.",
    "rpn.score.": "rpn.head.objectness.",
    "rpn.loc.": "rpn.head.deltas.",
    "head.classifier.0.": "roi_heads.box_head.fc6.",
    "head.classifier.2.": "roi_heads.box_head.fc7.",
    "head.classifier.3.": "roi_heads.box_head.fc7.",  # trained with dropout, which takes an index
    "head.score.": "roi_heads.predictor.scores.",
    "head.cls_loc.": "roi_heads.predictor.deltas.",
}


def _translate_torchvision(state: Mapping[str, Tensor], source: str) -> Translated:
    fpn_norm = "backbone.fpn.inner_blocks.0.1.running_mean" in state
    tensors = {torchvision_name(name, fpn_norm): tensor for name, tensor in state.items()}
    two_fc = "roi_heads.box_head.fc1.weight" in tensors
    channels = tensors["rpn.head.conv.weight"].shape[1]
    fc = tensors["roi_heads.box_head.fc1.weight" if two_fc else "roi_heads.box_head.fc.weight"]
    backbone = _torchvision_backbone(tensors, source)
    options = {
        "backbone.name": backbone,
        "backbone.fpn_channels": channels,
        "backbone.fpn_norm": "batch" if fpn_norm else "none",
        "backbone.box_head": "two_fc" if two_fc else "conv_fc",
        "backbone.box_head_channels": fc.shape[0],
        "backbone.pool_size": math.isqrt(fc.shape[1] // channels),
        **_rpn_options(tensors),
    }
    classes = len(tensors["roi_heads.predictor.scores.weight"]) - 1
    # Only the first published file is older than version 2 of this layer's names and has a ResNet.
    first = backbone == "resnet50_fpn" and "rpn.head.conv.weight" in state
    return Translated(tensors, options, COCO_NAMES if classes == len(COCO_NAMES) else None, 0.0 if first else None)


def torchvision_name(name: str, fpn_norm: bool = False) -> str:
    """Return our name of a tensor of torchvision's Faster R-CNNs; `fpn_norm`: its pyramid has batch norm."""
    if match := re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(.+)", name):
        kind, level, rest = match.groups()
        rest = rest if fpn_norm else rest.removeprefix("0.")
        return f"backbone.{'lateral' if kind == 'inner' else 'output'}.{level}.{rest}"
    if match := re.fullmatch(r"rpn\.head\.conv\.(\d+)\.0\.(.+)", name):
        depth, rest = int(match[1]), match[2]
        return f"rpn.head.conv.{rest}" if depth == 0 else f"rpn.head.deeper.{depth - 1}.{rest}"
    if match := re.fullmatch(r"backbone\.body\.(\d+\..+)", name):  # a MobileNet is its `features` alone
        return f"backbone.body.features.{match[1]}"
    return _renamed(name, _TORCHVISION)


def _torchvision_backbone(tensors: Mapping[str, Tensor], source: str) -> str:
    blocks = sum(bool(re.fullmatch(r"backbone\.body\.layer3\.\d+\.conv1\.weight", name)) for name in tensors)
    bottleneck = "backbone.body.layer1.0.conv3.weight" in tensors
    names = {(2, False): "resnet18_fpn", (6, True): "resnet50_fpn", (23, True): "resnet101_fpn"}
    if (blocks, bottleneck) in names:
        return names[blocks, bottleneck]
    last = tensors.get("backbone.body.features.16.0.weight")
    if last is not None and tuple(last.shape) == (960, 160, 1, 1):
        return "mobilenet_v3_large_fpn"
    raise InputError(
        f"{KEY} {source}: is a detector of torchvision on a backbone that is not there; known are "
        f"{', '.join(names.values())} and mobilenet_v3_large_fpn"
    )


def _translate_chenyuntc(state: Mapping[str, Tensor]) -> Translated:
    tensors = {_renamed(name, _CHENYUNTC): tensor for name, tensor in state.items()}
    for layer in ("rpn.head.deltas.", "roi_heads.predictor.deltas."):
        for kind in ("weight", "bias"):
            rows = tensors[layer + kind]
            tensors[layer + kind] = rows.unflatten(0, (-1, 4))[:, _YXHW_TO_XYWH].flatten(0, 1)
    options = {
        "backbone.name": "vgg16",
        "backbone.pool_size": math.isqrt(tensors["roi_heads.box_head.fc6.weight"].shape[1] // 512),
        **_rpn_options(tensors),
    }
    classes = len(tensors["roi_heads.predictor.scores.weight"]) - 1
    return Translated(tensors, options, VOC_CLASSES if classes == len(VOC_CLASSES) else None)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _rpn_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "rpn.conv_depth": 1 + sum(name.startswith("rpn.head.deeper.") for name in tensors) // 2,
        "rpn.hidden_channels": len(tensors["rpn.head.conv.weight"]),
        "roi.class_agnostic": False,
        ANCHORS: len(tensors["rpn.head.deltas.weight"]) // 4,
    }


def _options_of(model: FasterRCNN, backbone: BackboneConfig) -> dict[str, Any]:
    """Return the options that `Translated.options` may hold, with defaults resolved."""
    counts = model.rpn.anchor_generator.anchors_per_location
    return {
        "backbone.name": backbone.name,
        "backbone.fpn_channels": backbone.fpn_channels,
        "backbone.fpn_norm": backbone.fpn_norm,
        "backbone.box_head": backbone.box_head,
        "backbone.box_head_channels": model.roi_heads.box_head.out_channels,
        "backbone.pool_size": model.roi_heads.box_head.pool_size,
        "rpn.conv_depth": model.rpn.config.conv_depth,
        "rpn.hidden_channels": model.rpn.head.conv.out_channels if isinstance(model.rpn.head, RPNHead) else None,
        "roi.class_agnostic": model.roi_heads.config.class_agnostic,
        ANCHORS: counts[0] if len(set(counts)) == 1 else list(counts),
    }


def _adapt_anchors(tensors: dict[str, Tensor], model: FasterRCNN) -> None:
    """Bring objectness to one score or two per anchor, and rows to the order of the model's anchors."""
    if "rpn.head.deltas.weight" not in tensors:  # those of other anchors, or of numbers that differ between levels
        return
    anchors = model.rpn.anchor_generator.config
    in_order = anchors.sizes is not None or anchors.generator != "grid"
    ratios = 1 if in_order else len(anchors.of_level("aspect_ratios", 0))
    shape = (ratios, model.rpn.anchor_generator.anchors_per_location[0] // ratios)
    for kind in ("weight", "bias"):
        scores = tensors[f"rpn.head.objectness.{kind}"].unflatten(0, (math.prod(shape), -1))  # (A, 1 or 2, ...)
        if model.rpn.head.softmax and scores.shape[1] == 1:
            scores = torch.cat((-scores / 2, scores / 2), dim=1)  # whose difference is the score
        elif not model.rpn.head.softmax and scores.shape[1] == 2:
            scores = scores[:, 1:] - scores[:, :1]
        deltas = tensors[f"rpn.head.deltas.{kind}"].unflatten(0, (math.prod(shape), 4))
        for name, rows in (("objectness", scores), ("deltas", deltas)):
            if anchors.order == "scale_major":
                rows = rows.unflatten(0, shape).transpose(0, 1).flatten(0, 1)
            tensors[f"rpn.head.{name}.{kind}"] = rows.flatten(0, 1)
