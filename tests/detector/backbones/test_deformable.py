"""Deformable convolutions: they begin as plain ones, sample where their offsets say, and learn these."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from detector.backbones import BackboneConfig, build_backbone
from detector.backbones.deformable import DeformableConv2d
from detector.kernels.precision import install_kernels


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    ("name", "options"), [("resnet50_fpn", {}), ("resnet18_fpn", {}), ("resnet50_c4", {"box_head_stride": 1})]
)
def test_pretrained_networks_begin_as_the_plain_ones(
    name: Any, options: dict[str, Any], version: Any, tmp_path: Path
) -> None:
    """All numbers of the stages c3 to c5 are equal to 1e-5 of the largest, with the norms folded where they can be."""
    torch.manual_seed(0)
    weights = torchvision.models.get_model(name.partition("_")[0], weights=None).state_dict()
    for key, tensor in weights.items():
        if "running" in key or ("bn" in key and tensor.is_floating_point()):
            tensor.uniform_(0.4, 0.8)
    torch.save(weights, tmp_path / "weights.pth")
    config = {"weights": str(tmp_path / "weights.pth"), **options}
    plain, deformable = (
        nn.ModuleList(
            build_backbone(
                BackboneConfig(name, deformable=version, **config) if made else BackboneConfig(name, **config)
            )
        )
        for made in (False, True)
    )
    found = [key for key, module in deformable.named_modules() if isinstance(module, DeformableConv2d)]
    blocks = {"resnet50": (4, 6, 3), "resnet18": (2, 2, 2)}[name.partition("_")[0]]
    assert [sum(f"layer{stage}." in key for key in found) for stage in (2, 3, 4)] == list(blocks)
    missing = deformable[0].weights_report.missing
    assert {key.rpartition(".")[2] for key in missing} == {"offset_weight", "offset_bias"}
    assert len(missing) == 2 * len(found)
    deformable.load_state_dict(plain.state_dict(), strict=False)  # what is new in both, such as the pyramid
    for network in (plain, deformable):
        install_kernels(network[0], nn.Identity(), network[1])
        network.eval()
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        for ours, theirs in zip(deformable[0](images), plain[0](images), strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        pooled = torch.randn(2, plain[1].in_channels, plain[1].pool_size, plain[1].pool_size)
        ours, theirs = deformable[1](pooled), plain[1](pooled)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_offsets_and_factors_by_hand() -> None:
    """A 1 x 1 kernel of weight 1 that looks one row further down and half a column to the right, at half strength."""
    plain = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(plain.weight)
    layer = DeformableConv2d(plain, modulated=True)
    x = torch.tensor([[[[1.0, 2, 4], [8, 16, 32]]]])
    torch.testing.assert_close(layer(x), x)
    with torch.no_grad():
        layer.offset_bias.copy_(torch.tensor([1.0, 0.5, torch.logit(torch.tensor(0.25))]))  # dy, dx, 2 * sigmoid
    torch.testing.assert_close(layer(x), torch.tensor([[[[6.0, 12, 8], [0, 0, 0]]]]))  # beyond the border are zeros


def test_offsets_learn_and_autocast_leaves_them_in_float32() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    layer = DeformableConv2d(plain, modulated=False)
    x = torch.randn(2, 4, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.conv2d(x.bfloat16().float(), plain.weight, None, 2, 1).bfloat16())
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (layer.weight, layer.offset_weight))
    assert sorted(layer.state_dict()) == ["offset_bias", "offset_weight", "weight"]
