"""What evaluates in float32 on CPUs under autocast, and what does not."""

from typing import Any

import pytest
import torch
from torch import nn

from detector.backbones import build_backbone
from detector.backbones.base import BackboneConfig
from detector.rpn import RPNConfig, RPNHead


@pytest.mark.parametrize("name", ["mobilenet_v2_c4", "mobilenet_v2_fpn", "mobilenet_v3_large_fpn", "resnet18_c4"])
def test_depthwise_bodies_evaluate_in_float32_on_cpus(name: Any) -> None:
    """Under autocast their maps are those without; in training, and of other networks, they are bfloat16."""
    torch.manual_seed(0)
    config = BackboneConfig(name, weights=None, frozen_stages=0, norm="batch")
    backbone, _ = build_backbone(config, load_weights=False)
    body = backbone.body
    for norm in (module for module in body.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = body.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = body(x)
            trained = body.train()(x)
    assert {level.dtype for level in trained} == {torch.bfloat16}
    if name == "resnet18_c4":
        assert found[-1].dtype == torch.bfloat16
        return
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_float32_evaluation_leaves_bfloat16_networks_alone() -> None:
    """`--trainer.precision bf16-true` has no autocast, and weights that take bfloat16 only."""
    config = BackboneConfig("mobilenet_v2_c4", weights=None, frozen_stages=0, norm="batch")
    backbone, _ = build_backbone(config, load_weights=False)
    backbone.to(torch.bfloat16).eval()
    with torch.no_grad():
        (level,) = backbone(torch.rand(1, 3, 32, 32).bfloat16())
    assert level.dtype == torch.bfloat16


@pytest.mark.parametrize("channels, exact", [(128, True), (129, False)])
def test_narrow_heads_evaluate_in_float32(channels: int, exact: bool) -> None:
    """Under autocast on the CPU, of float32 features; in training they compute in bfloat16."""
    torch.manual_seed(0)
    head = RPNHead(channels, 3, RPNConfig(conv_depth=2, init_std=0.05))
    level = torch.rand(1, channels, 5, 7)
    with torch.no_grad():
        expected = head([level])[0][0]
        found = {}
        for training in (False, True):
            head.train(training)
            with torch.autocast("cpu", torch.bfloat16):
                found[training] = head([level])[0][0]
    assert found[False].dtype == torch.float32
    assert torch.equal(found[False], expected) == exact
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        of_rounded = head.eval()([level.bfloat16()])[0][0]
    assert torch.equal(of_rounded, found[True])
    assert not torch.equal(found[True], expected)
    torch.testing.assert_close(found[True], expected, rtol=0.05, atol=0.05)
