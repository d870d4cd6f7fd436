"""torchvision's Faster R-CNNs with random weights: the recipes give the same detections, losses and gradients.

torchvision itself builds its networks as its users get them: pretrained backbone weights are asked for, and random ones
handed out, so that norms and stages are frozen as they are there.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.backbones.box_heads import ConvFCHead
from detector.faster_rcnn import LOSS_NAMES, FasterRCNN
from detector.image_batch import ImageConfig, make_batch
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.state_dicts import WeightsReport
from detector.translation.foreign_checkpoints import load_detector

RECIPES = Path(__file__).resolve().parents[2] / "experiments" / "recipes"
CLASSES = 20
NAMES = [f"class {n}" for n in range(CLASSES)]
SIDES = (96, 144)
THEIR_SMALL = {"min_size": SIDES[0], "max_size": SIDES[1]}
SMALL = {"shortest_side": [SIDES[0]], "longest_side": SIDES[1]}
SIZES = [(75, 101), (104, 68), (121, 119), (58, 86), (96, 96)]
BATCHES = [[0, 1, 2], [3], [4]]
PER_LEVEL = 30  # proposals before NMS in evaluation: so those of all levels are seen
PROPOSALS = 40  # after NMS in training
DETECTIONS = 30
EVERYTHING = 1_000_000
NORMS = (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)


@dataclass
class Case:
    """A recipe, the backbone whose weights torchvision asks for, and gradients to compare: our name -> theirs.

    The tolerance is of gradients' norms. v2's box head takes a batch's statistics over RoIs that overlap: in float32
    both sides' gradients are 0.1% from float64's, and their pooled features differ in the last bits.
    """

    recipe: str
    weights_backbone: str | None
    gradients: dict[str, str]
    tolerance: float = 1e-4

    @property
    def constructor(self) -> Callable[..., nn.Module]:
        return getattr(detection, "fasterrcnn" + self.recipe.removeprefix("torchvision"))  # type: ignore[no-any-return]


HEADS = {
    "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
    "rpn.head.objectness.weight": "rpn.head.cls_logits.weight",
    "rpn.head.objectness.bias": "rpn.head.cls_logits.bias",
    "rpn.head.deltas.weight": "rpn.head.bbox_pred.weight",
    "roi_heads.predictor.scores.weight": "roi_heads.box_predictor.cls_score.weight",
    "roi_heads.predictor.scores.bias": "roi_heads.box_predictor.cls_score.bias",
    "roi_heads.predictor.deltas.weight": "roi_heads.box_predictor.bbox_pred.weight",
}
FULLY_CONNECTED = {
    "roi_heads.box_head.fc1.weight": "roi_heads.box_head.fc6.weight",
    "roi_heads.box_head.fc2.bias": "roi_heads.box_head.fc7.bias",
}
CASES = [
    Case(
        "torchvision_resnet50_fpn",
        "resnet50",
        HEADS
        | FULLY_CONNECTED
        | {
            "backbone.body.layer1.0.conv1.weight": "backbone.body.layer1.0.conv1.weight",  # frozen: none on both sides
            "backbone.body.layer2.0.downsample.0.weight": "backbone.body.layer2.0.downsample.0.weight",
            "backbone.body.layer4.2.conv3.weight": "backbone.body.layer4.2.conv3.weight",
            "backbone.lateral.0.weight": "backbone.fpn.inner_blocks.0.0.weight",
            "backbone.output.3.bias": "backbone.fpn.layer_blocks.3.0.bias",
        },
    ),
    Case(
        "torchvision_resnet50_fpn_v2",
        None,
        HEADS
        | {
            "backbone.body.conv1.weight": "backbone.body.conv1.weight",
            "backbone.body.layer3.5.bn2.weight": "backbone.body.layer3.5.bn2.weight",
            "backbone.lateral.1.0.weight": "backbone.fpn.inner_blocks.1.0.weight",
            "backbone.output.2.1.bias": "backbone.fpn.layer_blocks.2.1.bias",
            "rpn.head.deeper.0.weight": "rpn.head.conv.1.0.weight",
            "roi_heads.box_head.convs.0.0.weight": "roi_heads.box_head.0.0.weight",
            "roi_heads.box_head.convs.3.1.weight": "roi_heads.box_head.3.1.weight",
            "roi_heads.box_head.fc.weight": "roi_heads.box_head.5.weight",
        },
        tolerance=1e-2,
    ),
    Case(
        "torchvision_mobilenet_v3_large_320_fpn",
        "mobilenet_v3_large",
        HEADS
        | FULLY_CONNECTED
        | {
            "backbone.body.features.6.block.0.0.weight": "backbone.body.6.block.0.0.weight",  # frozen
            "backbone.body.features.7.block.0.0.weight": "backbone.body.7.block.0.0.weight",
            "backbone.body.features.13.block.2.fc1.weight": "backbone.body.13.block.2.fc1.weight",
            "backbone.body.features.16.0.weight": "backbone.body.16.0.weight",
            "backbone.lateral.1.weight": "backbone.fpn.inner_blocks.1.0.weight",
            "backbone.output.0.weight": "backbone.fpn.layer_blocks.0.0.weight",
        },
    ),
]
LOSSES = dict(zip(LOSS_NAMES, ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"), strict=True))
TARGETS = [  # boxes and labels of the images of the first batch, in their pixels
    ([(5.2, 8.3, 40.7, 35.1), (52.1, 24.2, 96.4, 72.5)], [3, 17]),
    ([(8.3, 12.6, 30.8, 88.1)], [9]),
    ([(2.7, 56.5, 64.1, 115.8), (68.2, 4.9, 112.1, 52.2), (24.1, 20.0, 48.5, 39.7)], [1, 20, 5]),
]


def randomise(network: nn.Module) -> None:
    """Give batch norms statistics and scales of their own, so that an omission shows.

    Frozen ones get small variances, which the epsilon matters to; residual branches small scales, because depth
    multiplies rounding errors otherwise.
    """
    for name, module in network.named_modules():
        if isinstance(module, NORMS):
            small = 0.1 if isinstance(module, torchvision.ops.FrozenBatchNorm2d) else 1.0
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.3, 1.5).mul_(small**2)
            module.weight.data.uniform_(0.3, 1.0).mul_(small * (0.2 if name.endswith("bn3") else 1))
            module.bias.data.uniform_(-0.3, 0.3)


@torch.no_grad()
def spread(layer: nn.Conv2d | nn.Linear, inputs: list[Tensor], scale: float, offset: float) -> None:
    """Weights with which the layer's outputs have these standard deviations: within a channel, and between channels."""
    assert layer.bias is not None
    layer.bias.data.zero_()
    outputs = torch.cat([layer(x).movedim(1, 0).flatten(1) for x in inputs], dim=1)  # (channels, samples)
    factor = scale / outputs.std(dim=1)
    layer.weight.data.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.data.copy_(torch.randn(len(factor)) * offset - outputs.mean(dim=1) * factor)


@torch.no_grad()
def torchvision_model(case: Case, monkeypatch: pytest.MonkeyPatch, training: bool = False, **options: Any) -> Any:
    """With random weights that, in this mode, give several detections of different classes and scores in each image."""
    torch.manual_seed(5)
    arguments: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": CLASSES + 1}
    if case.weights_backbone is not None:
        state = torchvision.models.get_model(case.weights_backbone, weights=None).state_dict()
        monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: state)
        arguments["weights_backbone"] = "IMAGENET1K_V1"
    network: Any = case.constructor(**(arguments | options))
    randomise(network)
    # As ours: on CPUs torch sums a batch's variance differently in channels-last order, by 0.02%.
    network.train(training).to(memory_format=torch.channels_last)
    network.rpn.eval()  # to give proposals without targets
    batch, _ = network.transform(unit_range(IMAGES[:2]))
    features = network.backbone(batch.tensors)
    head, roi_heads = network.rpn.head, network.roi_heads
    hidden = [head.conv(level) for level in features.values()]
    spread(head.cls_logits, hidden, scale=1.0, offset=0.5)
    spread(head.bbox_pred, hidden, scale=0.05, offset=0.1)
    proposals, _ = network.rpn(batch, features)
    vectors = roi_heads.box_head(roi_heads.box_roi_pool(features, proposals, batch.image_sizes))
    spread(roi_heads.box_predictor.cls_score, [vectors], scale=1.5, offset=1.0)
    spread(roi_heads.box_predictor.bbox_pred, [vectors], scale=0.05, offset=0.5)
    return network.train(training)


def smooth_noise() -> list[Tensor]:
    """Images (3, h, w), uint8, of all SIZES."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for height, width in SIZES:
        coarse = torch.rand(1, 3, height // 6, width // 6, generator=generator) * 255
        images.append(nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].to(torch.uint8))
    return images


IMAGES = smooth_noise()


def unit_range(images: list[Tensor]) -> list[Tensor]:
    """Images as torchvision takes them, to the last bit as ours are made."""
    return [image.float() * (1 / 255) for image in images]


def ours(
    case: Case, state: Mapping[str, Tensor], folder: Path, names: list[str] = NAMES, **changes: dict[str, Any]
) -> tuple[FasterRCNN, WeightsReport]:
    """The recipe's model, with torchvision's weights from a file."""
    options = yaml.safe_load((RECIPES / f"{case.recipe}.yaml").read_text())["model"]
    options = {part: options[part] | changes.get(part, {}) for part in ("backbone", "anchors", "rpn", "roi", "image")}
    backbone = BackboneConfig(**options["backbone"])
    parts = AnchorConfig(**options["anchors"]), RPNConfig(**options["rpn"]), RoIConfig(**options["roi"])
    model = FasterRCNN(len(names), backbone, *parts, ImageConfig(**options["image"]), load_weights=False)
    model.to(memory_format=torch.channels_last)
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)  # all must come from the file
    torch.save(state, folder / "torchvision.pth")
    report = load_detector(model, backbone, names, folder / "torchvision.pth", "match")
    assert (report.missing, report.unexpected) == ([], [])
    return model, report


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.recipe)
def test_detections_are_equal(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = torchvision_model(
        case,
        monkeypatch,
        **THEIR_SMALL,
        rpn_pre_nms_top_n_test=PER_LEVEL,
        box_detections_per_img=DETECTIONS,
    )
    model, report = ours(
        case,
        network.state_dict(),
        tmp_path,
        rpn={"pre_nms_test": PER_LEVEL},
        roi={"detections_per_image": DETECTIONS},
        image=SMALL,
    )
    assert report.remark == ""
    model.eval()
    for batch in BATCHES:
        expected = network(unit_range([IMAGES[index] for index in batch]))
        for mine, peer in zip(model([IMAGES[index] for index in batch])[0], expected, strict=True):
            assert len(peer["scores"].unique()) >= 20 and len(peer["labels"].unique()) >= 3
            assert torch.equal(mine["scores"], mine["scores"].sort(descending=True).values)
            mine, peer = by_class(mine), by_class(peer)
            assert torch.equal(mine["labels"], peer["labels"])
            for key in ("boxes", "scores"):
                torch.testing.assert_close(mine[key], peer[key], rtol=0, atol=1e-4)


def by_class(detections: dict[str, Tensor]) -> dict[str, Tensor]:
    """By descending score within each class: two classes may have the same score up to rounding."""
    order = detections["labels"].argsort(stable=True)
    return {key: values[order] for key, values in detections.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.recipe)
def test_losses_and_gradients_are_equal(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a batch of three sizes; the samplers keep all anchors and RoIs, so nothing is drawn."""
    network = torchvision_model(
        case,
        monkeypatch,
        training=True,
        **THEIR_SMALL,
        rpn_post_nms_top_n_train=PROPOSALS,
        rpn_post_nms_top_n_test=PROPOSALS,
        rpn_batch_size_per_image=EVERYTHING,
        box_batch_size_per_image=EVERYTHING,
    )
    model, _ = ours(
        case,
        network.state_dict(),
        tmp_path,
        rpn={"post_nms_train": PROPOSALS, "samples_per_image": EVERYTHING},
        roi={"samples_per_image": EVERYTHING},
        image=SMALL,
    )
    model.train()
    targets = [{"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)} for boxes, labels in TARGETS]
    images = [IMAGES[index] for index in BATCHES[0]]

    expected = network(unit_range(images), targets)
    sum(expected.values()).backward()
    losses = model.losses(images, [t | {"difficult": torch.zeros(len(t["labels"]))} for t in targets])
    losses["loss"].backward()
    for name, theirs in LOSSES.items():
        assert expected[theirs] > 1e-5
        torch.testing.assert_close(losses[name], expected[theirs], rtol=1e-4, atol=0)

    mine, peers = dict(model.named_parameters()), dict(network.named_parameters())
    for name, theirs in case.gradients.items():
        gradient, peer = mine[name].grad, peers[theirs].grad
        if peer is None:
            assert gradient is None
            continue
        if "predictor.deltas" in name:
            assert not peer[:4].any()  # of the background
            peer = peer[4:]
        assert gradient is not None and peer.norm() > 0
        assert (gradient - peer).norm() / peer.norm() < case.tolerance, name
    assert sum(peers[theirs].grad is None for theirs in case.gradients.values()) == (case.weights_backbone is not None)
    buffers = dict(network.named_buffers())
    for name, buffer in model.backbone.body.named_buffers():  # statistics of the batch, where they are followed
        theirs = "backbone.body." + name.removeprefix("features.")
        torch.testing.assert_close(buffer, buffers[theirs], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_first_published_file_needs_norms_without_epsilon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has older names; torchvision sets the epsilon to 0 for it alone."""
    case = CASES[0]
    old = torchvision_model(case, monkeypatch, num_classes=91, **THEIR_SMALL).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: copy.copy(old))
    published: Any = detection.fasterrcnn_resnet50_fpn(weights="COCO_V1", **THEIR_SMALL).eval()
    renamed = {re.sub(r"((?:inner|layer)_blocks\.\d|rpn\.head\.conv)(?:\.0)+\.", r"\1.", key): old[key] for key in old}
    assert {"rpn.head.conv.weight", "backbone.fpn.layer_blocks.3.bias"} <= set(renamed)
    names, images = [f"class {n}" for n in range(90)], IMAGES[3:4]
    batch, _ = published.transform(unit_range(images))
    expected = list(published.backbone(batch.tensors).values())
    differences, remarks = [], []
    for norm_eps in (0.0, 1e-5):
        model, report = ours(case, renamed, tmp_path, names, backbone={"norm_eps": norm_eps}, image=SMALL)
        features = model.eval().backbone(make_batch(images, model.image_config, training=False).tensors)
        differences.append(max(float((x - y).abs().max() / y.std()) for x, y in zip(features, expected, strict=True)))
        remarks.append(report.remark)
    assert differences[0] < 1e-4 < 1e-3 < differences[1]
    assert remarks == ["", "its batch norms were trained with backbone.norm_eps 0"]


def test_conv_fc_heads_are_equal_in_float64() -> None:
    """Their gradients too, which float32 blurs above."""
    torch.manual_seed(0)
    head = ConvFCHead(3, 8, 16).double()
    peer = FastRCNNConvFCHead((8, 3, 3), [8] * 4, [16], norm_layer=nn.BatchNorm2d).double()
    names = {name: re.sub(r"^fc", "5", name.removeprefix("convs.")) for name in head.state_dict()}
    assert sorted(names.values()) == sorted(peer.state_dict())
    peer.load_state_dict({names[name]: tensor for name, tensor in head.state_dict().items()})
    pooled = torch.randn(6, 8, 3, 3, dtype=torch.float64)
    for network in (head, peer):
        network(pooled).pow(2).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[names[name]].grad)
    torch.testing.assert_close(head.eval()(pooled), peer.eval()(pooled))
