"""torchvision's detector, made like one of ours, computes the same."""

from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.errors import InputError
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.training.lightning_module import FasterRCNNModule
from experiments.benchmark.torchvision_peer import build_peer, peer_batch

FIRST_CONVOLUTION = {
    "vgg16": ("backbone.0.weight", "backbone.body.features.0.weight"),
    "resnet18_c4": ("backbone.conv1.weight", "backbone.body.conv1.weight"),
    "resnet18_fpn": ("backbone.body.conv1.weight", "backbone.body.conv1.weight"),
    "mobilenet_v2_fpn": ("backbone.body.0.0.weight", "backbone.body.features.0.0.weight"),
    "mobilenet_v2_c4": ("backbone.0.0.weight", "backbone.body.features.0.0.weight"),
    "mobilenet_v3_large_320_fpn": ("backbone.body.0.0.weight", "backbone.body.features.0.0.weight"),
}


def test_weights_are_the_same(pair) -> None:
    name, model, peer, _ = pair
    theirs, ours = peer.state_dict(), model.state_dict()
    first_theirs, first_ours = FIRST_CONVOLUTION[name]
    names = {
        first_theirs: first_ours,
        "rpn.head.conv.0.0.weight": "rpn.head.conv.weight",
        "rpn.head.cls_logits.bias": "rpn.head.objectness.bias",
        "rpn.head.bbox_pred.weight": "rpn.head.deltas.weight",
        "roi_heads.box_predictor.cls_score.bias": "roi_heads.predictor.scores.bias",
    }
    for their_name, our_name in names.items():
        assert torch.equal(theirs[their_name], ours[our_name])
    assert torch.equal(
        theirs["roi_heads.box_predictor.bbox_pred.weight"][4:], ours["roi_heads.predictor.deltas.weight"]
    )
    background = 4 * (theirs["roi_heads.box_predictor.bbox_pred.weight"].shape[1] + 1)

    def trained(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)

    assert trained(peer) == trained(model) + background
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert trained(model) == everything if name == "vgg16" else 0 < trained(model) < everything


def test_detections_are_the_same(pair) -> None:
    _, model, peer, batch = pair
    with torch.inference_mode():
        ours = model.eval()(batch[0])[0]
        theirs = peer.eval()(peer_batch(batch)[0])
    for our, their in zip(ours, theirs, strict=True):
        assert len(our["boxes"]) > 5
        assert len(our["boxes"]) == pytest.approx(len(their["boxes"]), abs=1)
        # Sums in another order let a few candidates fall on the other side of a threshold.
        same = (box_iou(our["boxes"], their["boxes"]) > 0.99) & (our["labels"][:, None] == their["labels"])
        same &= (our["scores"][:, None] - their["scores"]).abs() < 1e-3
        assert same.any(dim=1).float().mean() >= 0.95


def test_losses_are_the_same(pair) -> None:
    _, model, peer, batch = pair
    with torch.no_grad():
        ours = model.train().losses(*batch)
        theirs = peer.train()(*peer_batch(batch))
    for our_name, their_name in (
        ("loss_rpn_cls", "loss_objectness"),
        ("loss_rpn_reg", "loss_rpn_box_reg"),
        ("loss_roi_cls", "loss_classifier"),
        ("loss_roi_reg", "loss_box_reg"),
    ):
        assert ours[our_name].item() == pytest.approx(theirs[their_name].item(), rel=0.01), our_name
    assert ours["loss"].item() == pytest.approx(sum(loss.item() for loss in theirs.values()), rel=0.005)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rpn": RPNConfig(cls_loss="focal")}, "rpn.cls_loss focal"),
        ({"rpn": RPNConfig(reg_loss="giou")}, "rpn.reg_loss giou"),
        ({"roi": RoIConfig(reg_loss="ciou")}, "roi.reg_loss ciou"),
        ({"anchors": AnchorConfig(sizes=[[30, 60]])}, r"anchors.sizes \[\[30, 60\]\]"),
    ],
)
def test_what_torchvision_lacks_is_refused(options: dict[str, Any], named: str) -> None:
    backbone = BackboneConfig("resnet18_c4", weights=None, frozen_stages=0, norm="batch")
    model = FasterRCNNModule(["cat"], backbone=backbone, **options).model
    with pytest.raises(InputError, match=f"its detector has no --model.{named}; give --peer none$"):
        build_peer(model, backbone)
