"""Double-Head: what its two halves see, give and learn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detector.backbones.base import BackboneConfig
from detector.backbones.box_heads import BoxPredictor, DoubleHead, new_box_head
from detector.errors import InputError
from detector.roi_heads import RoIConfig, RoIHeads
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL

BOXES = [torch.tensor([[20.0, 10, 60, 40], [100, 50, 120, 90]]), torch.tensor([[0.0, 0, 30, 200]])]


def double(scale: float = 1.3) -> DoubleHead:
    torch.manual_seed(0)
    return DoubleHead(3, 5, 8, scale).eval()


def features() -> Tensor:
    return torch.randn(2, 5, 13, 11, generator=torch.Generator().manual_seed(1))


def test_convolutions_see_larger_boxes_around_the_same_centres() -> None:
    heads = RoIHeads(double(1.5), (16,), 2, RoIConfig())
    pooled = heads.pool([features()], BOXES)
    larger = [torch.tensor([[10.0, 2.5, 70, 47.5], [95, 40, 125, 100]]), torch.tensor([[-7.5, -50, 37.5, 250]])]
    expected = [roi_align(features(), boxes, 3, 1 / 16, 2, aligned=True) for boxes in (BOXES, larger)]
    torch.testing.assert_close(pooled, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert RoIHeads(double(1.0), (16,), 2, RoIConfig()).pool([features()], BOXES).shape == (3, 5, 3, 3)


def test_levels_are_those_of_the_boxes_themselves() -> None:
    heads = RoIHeads(double(2.0), (8, 16), 2, RoIConfig())
    levels = [torch.full((1, 5, 32, 32), 1.0), torch.full((1, 5, 16, 16), 2.0)]
    assert heads.pool(levels, [torch.tensor([[60.0, 60, 180, 180]])])[0, :, 1, 1].tolist() == [1.0] * 10


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_scores_come_from_the_one_half_and_boxes_from_the_other(scale: float) -> None:
    head, predictor = double(scale), BoxPredictor(8, 2, False, 0.5, 0.5)
    pooled = torch.randn(4, 5 if scale == 1 else 10, 3, 3)
    for output, own, other in ((0, "fc", "blocks widen shortcut"), (1, "blocks widen shortcut", "fc")):
        head.zero_grad()
        predictor(head(pooled))[output].square().sum().backward()
        touched = {name for name, one in head.named_parameters() if one.grad is not None and bool(one.grad.any())}
        assert touched and all(name.startswith(tuple(own.split())) for name in touched)
        assert not any(name.startswith(tuple(other.split())) for name in touched)
    if scale != 1:
        changed = pooled.clone()
        changed[:, 5:] += 1.0  # what the convolutions see
        before, after = predictor(head(pooled)), predictor(head(changed))
        assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_the_layers_are_the_papers() -> None:
    """1024 wide: a block of 3 x 3 and 1 x 1 that widens, and four bottlenecks of 1 x 1, 3 x 3 and 1 x 1."""
    head = new_box_head(BackboneConfig(box_head="double"), 256)
    convolutions = [tuple(layer.weight.shape) for layer in head.modules() if isinstance(layer, torch.nn.Conv2d)]
    widening = [(256, 256, 3, 3), (1024, 256, 1, 1), (1024, 256, 1, 1)]
    assert convolutions == widening + 4 * [(256, 1024, 1, 1), (256, 256, 3, 3), (1024, 256, 1, 1)]
    linear = [tuple(layer.weight.shape) for layer in head.modules() if isinstance(layer, torch.nn.Linear)]
    assert linear == [(1024, 256 * 49), (1024, 1024)]
    assert head.eval()(torch.zeros(0, 512, 7, 7)).shape == (0, 2048)


@pytest.mark.parametrize(("kind", "norm"), [("group", nn.GroupNorm), ("sync", nn.SyncBatchNorm)])
def test_every_convolution_has_the_norm_that_is_asked_for(kind: Any, norm: type[nn.Module]) -> None:
    head = new_box_head(BackboneConfig(box_head="double", box_head_norm=kind, box_head_channels=64), 32)
    norms = [module for module in head.modules() if isinstance(module, norm)]
    assert len(norms) == sum(isinstance(module, nn.Conv2d) for module in head.modules()) == 3 + 4 * 3
    assert not any(type(module) is nn.BatchNorm2d for module in head.modules())


def test_group_norm_lets_rois_not_see_each_other() -> None:
    """Batch norm in training makes a RoI's vector depend on the others; group norm does not."""
    pooled = torch.randn(4, 10, 3, 3, generator=torch.Generator().manual_seed(2))
    for norm, alone in (("group", True), ("batch", False)):
        torch.manual_seed(0)
        head = DoubleHead(3, 5, 8, 1.3, norm).train()  # type: ignore[arg-type]
        assert torch.allclose(head(pooled)[:2], head(pooled[:2]), atol=1e-5) is alone


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_detector_learns_with_it(norm: Any) -> None:
    """A step lowers the loss of the same batch, moves both halves, and detections are boxes of the image."""
    torch.manual_seed(0)
    backbone = replace(SMALL, box_head="double", box_head_norm=norm)
    module = FasterRCNNModule(class_names=["thing", "other"], backbone=backbone, **OPTIONS)
    model = module.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(4):
        torch.manual_seed(1)  # the same samples
        loss = model.losses(*BATCH)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    for part in ("fc1", "fc2", "widen.0.0", "shortcut.0", "blocks.0.conv1", "blocks.3.conv3"):
        assert f"roi_heads.box_head.{part}.weight" in moved
    with torch.no_grad():
        for found in module.eval()(BATCH[0]):
            boxes = found["boxes"]
            assert len(boxes) and bool((boxes >= 0).all() & (boxes <= torch.tensor([96, 64, 96, 64])).all())


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"backbone\.box_head_channels: 30 must be a multiple of 4 for double"):
        BackboneConfig(box_head="double", box_head_channels=30)
    with pytest.raises(InputError, match=r"backbone\.box_head_scale: 0.0 must be positive"):
        BackboneConfig(box_head="double", box_head_scale=0.0)
    with pytest.raises(InputError, match="vgg16 has its own box head"):
        BackboneConfig("vgg16", box_head="double")
