"""Winograd's convolutions: the numbers of the definition up to rounding, and where they are used."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones import onednn, winograd
from detector.backbones.onednn import ConvReLU2d
from detector.backbones.vgg16 import VGG16Body
from detector.backbones.winograd import winograd_relu, worth_winograd

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the definition, in float64."""
    return F.relu(F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1))


@pytest.mark.parametrize("tile_rows", [1, 3, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", [(12, 10), (11, 13), (7, 8), (6, 9), (1, 1), (2, 5)])
def test_numbers_of_the_definition(monkeypatch, size, with_bias, tile_rows):
    """Sizes that tiles of 2 x 2 cells fit or exceed, in parts of so many rows of tiles."""
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "_BYTES", tile_rows * 16 * -(-size[1] // 2) * 5 * 4)
    x = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 5, 3, 3), torch.randn(4) if with_bias else None
    found = winograd_relu(x, weight, bias)
    assert found.shape == (2, 4, *size)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = exact(x, weight, bias)
    assert 0.1 < float((expected == 0).double().mean()) < 0.9
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_cell_by_hand():
    """1, 2, ... 9 around one input of 1, at the middle of 3 x 3 cells: the kernel mirrored."""
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    assert winograd_relu(x, weight, None)[0, 0].tolist() == [[9, 8, 7], [6, 5, 4], [3, 2, 1]]
    assert winograd_relu(x, weight, torch.tensor([-6.0]))[0, 0].tolist() == [[3, 2, 1], [0, 0, 0], [0, 0, 0]]


def test_rounding():
    """256 channels, as in VGG16's conv3_2: a relative error of a few times float32's 6e-8, mean of the squares."""
    torch.manual_seed(0)
    x, layer = torch.randn(1, 256, 40, 50).relu(), nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    expected = exact(x, layer.weight, layer.bias)
    error = winograd_relu(x, layer.weight, layer.bias) - expected
    assert 0 < error.square().mean().sqrt() / expected.square().mean().sqrt() < 2e-6


@pytest.mark.parametrize(
    ("options", "size", "worth"),
    [
        ({}, (20, 25), True),
        ({}, (19, 26), False),  # 494 cells
        ({"in_channels": 127}, (40, 50), False),
        ({"out_channels": 255}, (40, 50), False),
        ({"kernel_size": 1}, (40, 50), False),
        ({"padding": 0}, (40, 50), False),
        ({"padding": "same"}, (40, 50), False),
        ({"stride": 2}, (40, 50), False),
        ({"dilation": 2}, (40, 50), False),
        ({"groups": 2, "in_channels": 256}, (40, 50), False),
        ({"padding_mode": "reflect"}, (40, 50), False),
    ],
)
def test_which_layers(options, size, worth):
    shape = {"in_channels": 128, "out_channels": 256, "kernel_size": 3, "padding": 1} | options
    layer = nn.Conv2d(**shape, device="meta")
    assert worth_winograd(layer, torch.empty(1, layer.in_channels, *size, device="meta")) is worth


@pytest.fixture
def used(monkeypatch) -> list[tuple[int, ...]]:
    """Sizes of the maps that were computed so."""
    sizes: list[tuple[int, ...]] = []
    compute = onednn.winograd_relu
    monkeypatch.setattr(onednn, "winograd_relu", lambda x, *rest: sizes.append(tuple(x.shape)) or compute(x, *rest))
    return sizes


def test_in_vgg16(used):
    """From conv3_1 on, down to 500 cells; in evaluation in float32 only."""
    torch.manual_seed(0)
    body, images = VGG16Body().eval(), torch.randn(1, 3, 160, 224)
    (trained,) = body(images)
    assert used == []
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            body(images)
        with torch.backends.mkldnn.flags(enabled=False):
            body(images)
        assert used == []
        (found,) = body(images)
    assert used == [(1, 128, 40, 56), (1, 256, 40, 56), (1, 256, 40, 56)] + [(1, 256, 20, 28)] + [(1, 512, 20, 28)] * 2
    torch.testing.assert_close(found, trained, atol=1e-5, rtol=1e-4)


def test_in_frozen_layers_only(used):
    layer, x = ConvReLU2d(128, 256, 3, padding=1), torch.randn(1, 128, 24, 24)
    layer(x).sum().backward()
    assert used == []
    layer.zero_grad()
    layer.requires_grad_(False)(x)
    assert len(used) == 1
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.bias.grad.abs().sum() > 0
    layer.requires_grad_(False)(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0
    assert len(used) == 1
