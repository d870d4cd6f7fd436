"""The detectors that `frcnn benchmark train|infer` runs: with random weights, on random images.

Random weights are made like trained ones where that costs time: batch norm has the statistics of these images, and the
background's score is such that about `CANDIDATES` boxes of an image pass the score threshold.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast, get_type_hints

import torch
import torchvision
from torch import Tensor, nn

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig, BackboneName
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig
from detector.parts import name_of
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from experiments.benchmark.options import NetworkOptions

CLASSES: Final = 20
OBJECTS: Final = 6
CANDIDATES: Final = 300
SMALLEST: Final = 64
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


NETWORKS: Final[dict[str, tuple[int, int]]] = {
    "vgg16": (600, 800),
    "resnet50_c4": (600, 800),
    "resnet50_fpn": (600, 800),
    "resnet18_fpn": (320, 416),
    "mobilenet_v2_fpn": (320, 416),
    "mobilenet_v3_large_320_fpn": (320, 416),
}


@dataclass(frozen=True)
class Network:
    """A detector without its weights, its name, and the size of its images (height, width)."""

    name: str
    size: tuple[int, int]
    backbone: BackboneConfig
    anchors: AnchorConfig
    rpn: RPNConfig
    roi: RoIConfig
    image: ImageConfig
    difficult: Literal["drop", "keep", "ignore"] = "drop"


def standard_network(name: str, size: tuple[int, int]) -> Network:
    """Return a network with one feature level or a pyramid, with torchvision's defaults."""
    few = name == "mobilenet_v3_large_320_fpn"  # torchvision's detector of that name
    scales: list[Any] = [128, 256, 512]
    if name.endswith("fpn"):
        scales = [32, 64, 128, 256, 512] if few else [[32], [64], [128], [256], [512]]
    tested = 150 if few else 1000
    return Network(
        name,
        size,
        BackboneConfig(name=cast(BackboneName, name.replace("_320", "")), frozen_stages=3 if few else 2),
        AnchorConfig(
            scales=scales,
            aspect_ratios=[0.5, 1, 2],
            base_size=1,
            center_offset="zero",
            spacing="fitted",
            rounding="nearest",
            straddling="keep",
        ),
        RPNConfig(
            pre_nms_train=2000,
            post_nms_train=2000,
            pre_nms_test=tested,
            post_nms_test=tested,
            score_threshold=0.05 if few else 0,
        ),
        RoIConfig(samples_per_image=512, pooling="roi_align_legacy", reg_beta=1 / 9, nms_iou=0.5),
        ImageConfig(shortest_side=[min(size)], longest_side=max(size)),
    )


def chosen_networks(options: NetworkOptions) -> list[Network]:
    """Return the networks that are named, all of `NETWORKS` where none is, or that of an experiment's file.

    Raises:
        InputError: An unknown name, a name beside a file, an unreadable file, a bad option or size.
    """
    size = options.size
    if size is not None and (len(size) != 2 or min(size) < SMALLEST):
        raise InputError(f"--size {size}: must be [height, width] of at least {SMALLEST} pixels each")
    if options.config is None:
        if options.option:
            raise InputError(f"--option {options.option[0]}: is for --config")
        names = options.networks or list(NETWORKS)
        for name in names:
            if name not in NETWORKS:
                raise InputError(f"--networks: {name!r} is none of {', '.join(NETWORKS)}; give others by --config")
        sizes = [NETWORKS[name] if size is None else (size[0], size[1]) for name in names]
        return [standard_network(name, own) for name, own in zip(names, sizes, strict=True)]
    if size is not None:
        raise InputError("--size: is for --networks; an experiment's file has --option model.image.shortest_side=[...]")
    if options.networks:
        raise InputError("--networks and --config: give one of them")
    from experiments.run.training_options import OptionsCLI

    arguments = ["--config", options.config, *(f"--{option}" for option in options.option)]
    model = OptionsCLI(arguments, prog="frcnn benchmark").config.model
    kinds: dict[str, Any] = get_type_hints(Network)
    parts = {name: kinds[name](**model[name].as_dict()) for name in ("backbone", "anchors", "rpn", "roi", "image")}
    shortest, longest = parts["image"].shortest_side[-1], parts["image"].longest_side
    own = (shortest, min(longest, shortest * 4 // 3))
    return [Network(Path(options.config).stem, own, difficult=model.difficult, **parts)]


def make_images(size: tuple[int, int], number: int, objects: int, device: torch.device) -> Batch:
    """Return images (3, H, W) uint8 of coarse noise with rectangles of other noise, and targets of these rectangles."""
    rng = torch.Generator().manual_seed(0)
    height, width = size
    images, targets = [], []
    for index in range(number):
        coarse = torch.rand(1, 3, height // 16, width // 16, generator=rng) * 255
        image = nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
        extent = torch.tensor([width, height]).repeat(2)
        sides = 0.08 + 0.5 * torch.rand(objects, 2, generator=rng) ** 2
        corners = torch.rand(objects, 2, generator=rng) * (1 - sides)
        boxes = torch.cat((corners, corners + sides), dim=1) * extent
        for x1, y1, x2, y2 in boxes.int().tolist():
            patch = image[:, y1:y2, x1:x2]
            patch.copy_((patch + 128 * torch.rand(3, 1, 1, generator=rng)).clamp(max=255))
        images.append(image.to(torch.uint8).to(device))
        labels = torch.randint(1, CLASSES + 1, (objects,), generator=rng)
        target = {"boxes": boxes, "labels": labels, "difficult": torch.zeros(objects, dtype=torch.bool)}
        targets.append({key: value.to(device) for key, value in target.items()} | {"image_id": torch.tensor(index)})
    return images, targets


def build_network(network: Network, batch: Batch) -> tuple[FasterRCNN, BackboneConfig]:
    """Return our detector with random weights on the CPU, and the backbone's options with them."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        backbone = network.backbone
        if not backbone.random:
            backbone = replace(backbone, weights=str(_random_weights(backbone, batch, Path(folder))))
        model = FasterRCNN(
            CLASSES, backbone, network.anchors, network.rpn, network.roi, network.image, network.difficult
        )
    set_background_score(model.eval(), [image.cpu() for image in batch[0][:1]])
    return model.to(memory_format=torch.channels_last), backbone


def _random_weights(config: BackboneConfig, batch: Batch, folder: Path) -> Path:
    """Write random weights of the classification network, with the batch norm's statistics of the images."""
    network = torchvision.models.get_model(name_of(config.name).removesuffix("_fpn").removesuffix("_c4"), weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.eps = 1.0, config.norm_eps
    with torch.no_grad():
        images = torch.stack(batch[0]).cpu().float()
        network.train()((images - images.mean()) / images.std())
    path = folder / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@torch.no_grad()
def set_background_score(model: FasterRCNN, images: list[Tensor]) -> None:
    """Make scores of classes differ as a trained detector's, and find a bias of the background by bisection."""
    features, batch = model.features(images)
    proposals = model.proposals(features, batch)
    for heads in model.roi_heads.stages:
        scores = heads.predictor.scores
        logits, _ = heads(features, proposals)
        scores.weight.mul_(2.0 / logits.std())
        logits, _ = heads(features, proposals)
        low, high = 0.0, 50.0
        for _ in range(30):
            middle = (low + high) / 2
            logits[:, 0] += middle
            found = int((logits.softmax(1)[:, 1:] > model.roi_heads.config.score_threshold).sum())
            logits[:, 0] -= middle
            low, high = (middle, high) if found > CANDIDATES else (low, middle)
        scores.bias[0] = low
