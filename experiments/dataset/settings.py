"""The settings of a training, and why: chosen by what a dataset holds and what the machine can do."""

import math
import os
import socket
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torchvision.ops import box_iou

from datamodules.ground_truth import SplitTruth
from datamodules.parallel import available_cores
from detector.anchors import AnchorConfig
from detector.backbones import BackboneConfig, backbone_strides, build_backbone
from detector.errors import InputError
from detector.image_batch import ImageConfig
from experiments.anchors.suggestion import suggest_anchors
from experiments.anchors.views import training_views
from experiments.benchmark.measuring import processor
from experiments.dataset.options import Network
from experiments.output import percent

GIB: Final = 2**30
CROWDED: Final = 0.1
"""Share of objects that overlap another one of their class, from which on NMS must let more pass."""
LEAST_GAIN: Final = 0.01
"""Mean best IoU that fitted anchors have to gain, or the usual ones stay."""
RARE: Final = 50
"""Objects of a class, below which it cannot learn boxes of its own."""
IMAGES: Final = 2000
"""Most images that are searched for such objects."""


@dataclass(frozen=True)
class Machine:
    """What trains.

    Attributes:
        name: Of the GPU, or of the processor.
        gpu: Whether it is one.
        memory: Bytes, of the GPU or of the computer.
        cores: That this process may use.
    """

    name: str
    gpu: bool
    memory: int
    cores: int


def this_machine() -> Machine:
    """Return the first GPU, or the processor where there is none."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(properties.name, True, properties.total_memory, available_cores())
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})  # not on Windows
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 8 * GIB
    return Machine(processor(), False, memory, available_cores())


@dataclass(frozen=True)
class Preset:
    """How a network is trained.

    Attributes:
        why: What it is good for.
        sides: The least and the most that the shorter side of images is resized to.
        smallest: Pixels, after resizing, from which on it finds objects well: a stride and a half, or two.
        anchors: Usual ones.
        views: Images that a training sees at least, each counted as often as it is seen.
        epochs: The least and the most.
        warmup: Most steps.
        memory: Bytes that a training step takes for each pixel of its batch, about.
        batch: Most images in a step.
    """

    why: str
    sides: tuple[int, int]
    smallest: int
    anchors: AnchorConfig
    views: int
    epochs: tuple[int, int]
    warmup: int
    memory: int
    batch: int


PRESETS: Final[dict[Network, Preset]] = {
    "resnet50_fpn": Preset(
        "the usual network for a GPU; mobilenet_v2_c4 is faster and finds less",
        (640, 1024),
        16,
        AnchorConfig([[32.0], [64.0], [128.0], [256.0], [512.0]], base_size=1, center_offset="zero", straddling="keep"),
        *(24_000, (12, 60), 500, 2500, 8),
    ),
    "mobilenet_v2_c4": Preset(
        "small enough for a processor; on a GPU resnet50_fpn finds more",
        (320, 640),
        24,
        AnchorConfig([2.0, 4.0, 8.0, 16.0], straddling="keep"),
        *(6000, (8, 60), 100, 2500, 4),
    ),
    "small_c4": Preset(
        "made to be trained from scratch; with pretrained weights mobilenet_v2_c4 and resnet50_fpn find much more",
        (224, 448),
        16,
        AnchorConfig([1.0, 2.0, 4.0, 8.0], straddling="keep"),
        *(16_000, (12, 100), 300, 2500, 4),
    ),
}


def choose_network(asked: Network | None, weights: str, machine: Machine) -> tuple[Network, str, str]:
    """Return the network, its weights, and what there is to say about these.

    Args:
        asked: The network, where one is asked for.
        weights: As `frcnn init --weights`.
        machine: What trains.

    Raises:
        InputError: Weights that were asked for cannot be used.
    """
    name: Network = asked or ("resnet50_fpn" if machine.gpu else "mobilenet_v2_c4")
    if weights == "none" or name == "small_c4":
        return asked or "small_c4", "none", "everything is learned from these images"
    source = "imagenet" if weights == "auto" else weights
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # for a network that swallows what is sent
    try:
        build_backbone(BackboneConfig(name=name, weights=source))
    except InputError as error:
        if weights != "auto":
            raise
        how = str(error).partition("; ")[2].partition(", or pass")[0]
        return asked or "small_c4", "none", f"ImageNet's for {name} would find much more: {how}, and init again"
    finally:
        socket.setdefaulttimeout(before)
    return name, source, "trained on ImageNet, so that a few hundred images are enough"


def choose_settings(network: Network, weights: str, truth: SplitTruth, machine: Machine) -> dict[str, Any]:
    """Return values of the config, the reasons for them under `why`.

    Args:
        network: The network.
        weights: Its weights; `none`: random ones.
        truth: The objects that are trained on.
        machine: What trains.

    Raises:
        InputError: There are none.
    """
    if not len(truth.objects.box):
        raise InputError(f"none of the {len(truth.sizes)} images to train on has an object")
    preset = PRESETS[network]
    shortest, longest, why = _sizes(truth, preset)
    anchors, why["anchors"] = _anchors(network, truth, preset, ImageConfig([shortest], longest))
    heads, why_heads = _heads(truth)
    images = len(truth.sizes)
    fitting = int(0.5 * machine.memory / (preset.memory * shortest * longest))
    batch_size = max(1, min(preset.batch, fitting, images // 4))
    least, most = preset.epochs
    epochs = 4 * math.ceil(min(max(preset.views / images, least), most) / 4)
    steps = epochs * max(1, images // batch_size)
    warmup = min(preset.warmup, steps // 5)
    why |= {
        **why_heads,
        "backbone": preset.why,
        "batch_size": f"images in a step, for {machine.memory / GIB:.0f} GiB of memory and {images} images",
        "epochs": f"{steps} steps; the fewer images there are, the more often they are seen, {least} to {most} times",
        "warmup": f"of {steps} steps",
        "workers": f"read images beside the training, on {machine.cores} cores",
    }
    return {
        "network": network,
        "weights": weights,
        "shortest": shortest,
        "longest": longest,
        "anchors": anchors,
        **heads,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "warmup": warmup,
        "lr": 0.00125 * batch_size if network == "resnet50_fpn" else 0.002 if weights == "none" else 0.0003,
        "ema": 0.99 if weights == "none" else 0.995,
        "workers": max(1, min(machine.cores - 1, 8 if machine.gpu else 1)),
        "why": why,
    }


def _sizes(truth: SplitTruth, preset: Preset) -> tuple[int, int, dict[str, str]]:
    """Return the shortest and the longest side of images, and why."""
    objects, sides = truth.objects, truth.sizes.min(axis=1)
    width, height = (objects.box[:, 2:] - objects.box[:, :2]).T
    small = float(np.quantile(np.sqrt(width * height) / sides[objects.image_id], 0.1))  # of the shorter side
    own = float(np.median(sides))
    least, most = preset.sides
    wanted = min(max(preset.smallest / small, min(least, 1.5 * own)), most, 2 * own)
    shortest = max(64, 32 * round(wanted / 32))
    ratio = min(float(np.quantile(truth.sizes.max(axis=1) / sides, 0.95)), 2.0)
    why = {
        "shortest": f"the files have {own:.0f}; of ten objects nine are then {small * shortest:.0f} pixels or larger",
        "longest": f"the longer side is up to {ratio:.2f} times the shorter one in 19 images of 20",
    }
    return shortest, 32 * math.ceil(shortest * ratio / 32), why


def _anchors(network: Network, truth: SplitTruth, preset: Preset, image: ImageConfig) -> tuple[AnchorConfig, str]:
    """Return the anchors that fit the objects, or the usual ones where these are as good, and why."""
    usual, objects = preset.anchors, truth.objects
    kept = ~objects.difficult
    views = training_views(image, truth.sizes, objects.box[kept], objects.image_id[kept])
    if len(np.unique(views[0].image)) < 2:
        return usual, "the usual ones: too few images show objects to fit others"
    per_level = isinstance(usual.scales[0], list)
    found = suggest_anchors(usual, backbone_strides(network), views, 1 if per_level else len(usual.scales))
    given = f"{found.given_mean_best_iou:.2f} by the usual {usual.scales}"
    if found.mean_best_iou < found.given_mean_best_iou + LEAST_GAIN:
        return usual, f"mean best IoU {given}: frcnn anchors --suggest finds none that are clearly better"
    return found.applied(
        usual
    ), f"mean best IoU {found.mean_best_iou:.2f} on images that they were not fitted to, {given}"


def _heads(truth: SplitTruth) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the number of objects, of a class and of an image, and their overlaps decide, and why."""
    objects = truth.objects
    rarest = int(np.bincount(objects.label, minlength=len(truth.class_names) + 1)[1:].min())
    most = int(np.bincount(objects.image_id).max())
    near = 0
    inside = objects.image_id < IMAGES
    for image in np.unique(objects.image_id[inside]):
        here = objects.image_id == image
        label = objects.label[here]
        ious = box_iou(*(torch.from_numpy(objects.box[here]),) * 2).numpy()
        near += int((((ious > 0.3) & (label[:, None] == label)).sum(axis=1) > 1).sum())
    share = near / max(int(inside.sum()), 1)
    crowded = share > CROWDED
    return {
        "class_agnostic": rarest < RARE and len(truth.class_names) > 1,
        "nms_iou": 0.5 if crowded else 0.3,
        "proposals": 300 if most > 50 else 150,
        "detections": 300 if most > 75 else 100,
        "most": most,
    }, {
        "class_agnostic": f"the rarest class has {rarest} objects: all share their box regression",
        "nms_iou": f"{percent(share, '.1f')} of objects overlap one of their class by more than 0.3",
    }
