"""What is installed in built networks: the same tensors and numbers, and which layers compute in float32."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from detector.backbones import build_backbone
from detector.backbones.base import BackboneConfig
from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.kernels.onednn import Conv2d, Linear
from detector.kernels.precision import install_kernels, replace_layers
from detector.rpn import RPNConfig, RPNHead


def build(name: Any, weights: str | None = None, load_weights: bool = False, **options: Any) -> Any:
    """The backbone and the box head, with what is installed."""
    torch.manual_seed(0)
    config = BackboneConfig(name, weights=weights, frozen_stages=0, **options)
    backbone, box_head = build_backbone(config, load_weights)
    install_kernels(backbone, nn.Identity(), box_head)
    return backbone, box_head


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18_fpn", "mobilenet_v2_c4", "mobilenet_v3_large_fpn"])
def test_tensors_and_random_numbers_stay(name: Any) -> None:
    """All frozen norms are folded; parameters are the same objects under the same names, in the same order."""
    with torch.device("meta" if name == "vgg16_bn" else "cpu"):
        networks = build_backbone(BackboneConfig(name, weights="imagenet", frozen_stages=2), load_weights=False)
    before = [dict(network.named_parameters()) for network in networks]
    names = [list(network.state_dict()) for network in networks]
    state = torch.get_rng_state()
    install_kernels(networks[0], nn.Identity(), networks[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert [list(network.state_dict()) for network in networks] == names
    for network, parameters in zip(networks, before, strict=True):
        after = dict(network.named_parameters())
        assert list(after) == list(parameters) and all(after[name] is parameters[name] for name in after)
        kinds = Counter(type(module) for module in network.modules())
        assert kinds[nn.Conv2d] == kinds[nn.Linear] == 0
        assert all(module.folded for module in network.modules() if isinstance(module, FrozenBatchNorm2d))
        assert sum(bool(m.norm) for m in network.modules() if isinstance(m, Conv2d)) == kinds[FrozenBatchNorm2d]
    assert not any(module.training for stage in networks[0].body.stages()[:2] for module in stage)


@pytest.mark.parametrize("name", ["resnet18_fpn", "mobilenet_v2_c4"])
def test_folding_changes_no_number(name: Any) -> None:
    torch.manual_seed(0)
    networks = nn.ModuleList(build_backbone(BackboneConfig(name, weights="imagenet", frozen_stages=2), False))
    for norm in (module for module in networks.modules() if isinstance(module, FrozenBatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
    images, pooled = torch.randn(1, 3, 65, 70), torch.randn(3, networks[1].in_channels, 7, 7)
    with torch.no_grad():
        expected = [*networks.eval()[0](images), networks[1](pooled)]
        install_kernels(networks[0], nn.Identity(), networks[1])
        for ours, theirs in zip([*networks[0](images), networks[1](pooled)], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_layers_of_others_are_left_alone() -> None:
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(Own(3, 4, 1), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same"), nn.Linear(3, 2))
    replace_layers(network.eval())
    assert type(network[0]) is Own and not network[1].folded
    assert isinstance(network[2], Conv2d) and network[2].padding == "same" and not network[2].training
    assert isinstance(network[3], Linear)


@pytest.mark.parametrize("name", ["mobilenet_v2_c4", "mobilenet_v2_fpn", "mobilenet_v3_large_fpn", "resnet18_c4"])
def test_depthwise_bodies_evaluate_in_float32_on_cpus(name: Any) -> None:
    """Under autocast their maps are those without; in training, and of other networks, they are bfloat16."""
    backbone, _ = build(name, norm="batch")
    body = backbone.body
    for norm in (module for module in body.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = body.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = body(x)
            trained = backbone.train().freeze(1).body(x)  # the frozen stage, too
            stem = body.stages()[0][0](x)
    assert {level.dtype for level in trained} == {torch.bfloat16} == {stem.dtype}
    if name == "resnet18_c4":
        assert found[-1].dtype == torch.bfloat16
        return
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_float32_evaluation_leaves_bfloat16_networks_alone() -> None:
    """`--trainer.precision bf16-true` has no autocast, and weights that take bfloat16 only."""
    backbone, _ = build("mobilenet_v2_c4", norm="batch")
    backbone.to(torch.bfloat16).eval()
    with torch.no_grad():
        (level,) = backbone(torch.rand(1, 3, 32, 32).bfloat16())
    assert level.dtype == torch.bfloat16


def test_depthwise_convolutions_with_a_stride_train_in_float32() -> None:
    backbone, _ = build("mobilenet_v2_c4", norm="batch")
    kinds = {}
    for conv in (module for module in backbone.body.modules() if isinstance(module, nn.Conv2d)):
        with torch.autocast("cpu", torch.bfloat16):
            kind = conv(torch.rand(1, conv.in_channels, 8, 8, dtype=torch.bfloat16)).dtype
        kinds.setdefault((conv.groups > 1, conv.stride[0]), set()).add(kind)
    both = {torch.bfloat16}
    assert kinds == {(False, 1): both, (False, 2): both, (True, 1): both, (True, 2): {torch.float32}}


@pytest.mark.parametrize("channels, exact", [(128, True), (129, False)])
def test_narrow_heads_evaluate_in_float32(channels: int, exact: bool) -> None:
    """Under autocast on the CPU, of float32 features; in training they compute in bfloat16."""
    backbone, box_head = build("small_c4")
    torch.manual_seed(0)
    head = RPNHead(channels, [3], RPNConfig(conv_depth=2, init_std=0.05))
    install_kernels(backbone, head, box_head)
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


def test_float32_up_to_an_ill_conditioned_norm(tmp_path) -> None:
    """In all ways in which weights arrive: a weights file, a state dict, a copy."""
    state = torchvision.models.mobilenet_v2().state_dict()
    state["features.2.conv.0.1.running_mean"][5] = -65.0  # of a deviation of 1
    torch.save(state, tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")
    backbone, _ = build("mobilenet_v2_c4", weights, load_weights=True)
    loaded, _ = build("mobilenet_v2_c4", weights)
    loaded.load_state_dict(backbone.state_dict())
    for network in (backbone, loaded, copy.deepcopy(loaded)):
        convolutions = [module for module in network.modules() if isinstance(module, Conv2d)]
        assert [conv.float32 for conv in convolutions] == [True] * 4 + [False] * (len(convolutions) - 4)
    body = backbone.body
    early = nn.Sequential(*body.features[:2], body.features[2].conv[0])
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        expected = early(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(early(x), expected, rtol=0, atol=0)
            assert backbone(x)[0].dtype == torch.bfloat16
    state = backbone.state_dict()
    state["body.features.2.conv.0.1.running_mean"][5] = 63.0
    backbone.load_state_dict(state)
    assert not any(module.float32 for module in backbone.modules() if isinstance(module, Conv2d))
