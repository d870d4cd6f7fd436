"""Winograd's convolutions: the numbers of the definition up to rounding, and where they are used."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.backbones.vgg16 import VGG16Body
from detector.kernels import cpu_paths, onednn, winograd
from detector.kernels.checkpointing import run_stage
from detector.kernels.onednn import Conv2d
from detector.kernels.precision import replace_layers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the definition, in float64."""
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


@pytest.mark.parametrize("tile_rows", [1, 3, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", [(12, 10), (11, 13), (7, 8), (6, 9), (1, 1), (2, 5)])
def test_numbers_of_the_definition(monkeypatch, size, with_bias, tile_rows):
    """Sizes that tiles of 2 x 2 cells fit or exceed, in parts of so many rows of tiles."""
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "_BYTES", tile_rows * 16 * -(-size[1] // 2) * 5 * 4)
    x = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 5, 3, 3), torch.randn(4) if with_bias else None
    found = winograd.winograd(x, weight, bias)
    assert found.shape == (2, 4, *size)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = exact(x, weight, bias)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_cell_by_hand():
    """1, 2, ... 9 around one input of 1, at the middle of 3 x 3 cells: the kernel mirrored."""
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    assert winograd.winograd(x, weight, None)[0, 0].tolist() == [[9, 8, 7], [6, 5, 4], [3, 2, 1]]
    bias = torch.tensor([-6.0])
    assert winograd.winograd(x, weight, bias)[0, 0].tolist() == [[3, 2, 1], [0, -1, -2], [-3, -4, -5]]


def test_rounding():
    """256 channels, as in VGG16's conv3_2: a relative error of a few times float32's 6e-8, mean of the squares."""
    torch.manual_seed(0)
    x, layer = torch.randn(1, 256, 40, 50).relu(), nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    expected = exact(x, layer.weight, layer.bias)
    error = winograd.winograd(x, layer.weight, layer.bias) - expected
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
        ({"padding": (1, 0)}, (40, 50), False),
        ({"stride": 2}, (40, 50), False),
        ({"dilation": 2}, (40, 50), False),
        ({"groups": 2, "in_channels": 256}, (40, 50), False),
        ({"padding_mode": "reflect"}, (40, 50), False),
    ],
)
def test_which_layers(used, options, size, worth):
    shape = {"in_channels": 128, "out_channels": 256, "kernel_size": 3, "padding": 1} | options
    layer = Conv2d(**shape).requires_grad_(False)
    x = torch.randn(1, layer.in_channels, *size)
    found = layer(x)
    assert used == ([tuple(x.shape)] if worth else [])
    expected = nn.Conv2d.forward(layer, x) if not worth else exact(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.fixture
def used(monkeypatch) -> list[tuple[int, ...]]:
    """Sizes of the maps that were computed so, by the paths `onednn`."""
    sizes: list[tuple[int, ...]] = []
    compute = onednn.winograd
    monkeypatch.setattr(onednn, "winograd", lambda x, *rest: sizes.append(tuple(x.shape)) or compute(x, *rest))
    monkeypatch.setattr(cpu_paths, "_chosen", "onednn")
    return sizes


def test_in_vgg16(used):
    """From conv3_1 on, down to 500 cells; in evaluation only."""
    torch.manual_seed(0)
    body, images = VGG16Body().eval(), torch.randn(1, 3, 160, 224)
    replace_layers(body)
    (trained,) = body(images)
    assert used == []
    with torch.no_grad():
        with torch.backends.mkldnn.flags(enabled=False):
            body(images)
        assert used == []
        (found,) = body(images)
    assert used == [(1, 128, 40, 56), (1, 256, 40, 56), (1, 256, 40, 56)] + [(1, 256, 20, 28)] + [(1, 512, 20, 28)] * 2
    torch.testing.assert_close(found, trained, atol=1e-5, rtol=1e-4)


def test_in_float32_only(used):
    layer, x = Conv2d(128, 256, 3, padding=1), torch.randn(1, 128, 24, 24)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert used == []
        layer(x)
    assert len(used) == 1


def test_in_frozen_layers_only(used):
    layer, x = Conv2d(128, 256, 3, padding=1), torch.randn(1, 128, 24, 24)
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


SMALL = {"_CHANNELS": 2, "_MORE_CHANNELS": 4, "_CELLS": 6}


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Which passes of training were computed so, from 2 and 4 channels and 6 cells on, by the paths `winograd`."""
    passes: list[str] = []
    for name in ("winograd", "winograd_input_gradient", "winograd_weight_gradient"):
        compute = getattr(winograd, name)

        def note(*tensors, name=name, compute=compute):
            passes.append(name.removeprefix("winograd_"))
            return compute(*tensors)

        monkeypatch.setattr(winograd, name, note)
    for name, value in SMALL.items():
        monkeypatch.setattr(winograd, name, value)
    monkeypatch.setattr(cpu_paths, "_chosen", "winograd")
    return passes


EVERY_PASS = ["winograd", "input_gradient", "weight_gradient"]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As a layer with these tensors."""
    return Conv2d(1, 1, 3, padding=1)._conv_forward(x, weight, bias)


def gradients(function, *leaves: Tensor | None) -> list[Tensor]:
    """The result, and the gradients of a sum of its squares."""
    result = function(*leaves)
    return [result, *torch.autograd.grad(result.square().sum(), [leaf for leaf in leaves if leaf is not None])]


@pytest.mark.parametrize("tile_rows", [1, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", [(12, 10), (11, 13), (7, 8), (1, 6), (2, 5)])
def test_gradients_are_those_of_the_definition(trained, monkeypatch, size, with_bias, tile_rows):
    """In float64; of two images, in parts of so many rows of tiles."""
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "_BYTES", tile_rows * 16 * -(-size[1] // 2) * 5 * 4)
    leaves = [torch.randn(2, 5, *size), torch.randn(4, 5, 3, 3), torch.randn(4) if with_bias else None]
    exactly = [None if leaf is None else leaf.double().requires_grad_() for leaf in leaves]
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
    found = gradients(convolve, *leaves)
    assert trained == EVERY_PASS
    expected = gradients(lambda *own: F.conv2d(*own, padding=1), *exactly)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()


def test_rounding_of_gradients():
    """256 channels, as in VGG16's conv3_2: as small an error as that of PyTorch's, mean of the squares."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 30, 40).relu(), torch.randn(256, 256, 3, 3) / 48
    gradient = torch.randn(1, 256, 30, 40)
    mask = [1], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    expected = torch.ops.aten.convolution_backward(gradient.double(), x.double(), weight.double(), *mask)[:2]
    found = winograd.winograd_input_gradient(gradient, weight), winograd.winograd_weight_gradient(x, gradient)
    for ours, exactly in zip(found, expected, strict=True):
        assert 0 < (ours - exactly).square().mean().sqrt() / exactly.square().mean().sqrt() < 2e-6


def test_one_gradient_by_hand():
    """Of one cell of the result: the weights around it, and the inputs around it."""
    gradient = torch.zeros(1, 1, 3, 3)
    gradient[0, 0, 1, 1] = 2
    numbers = torch.arange(1.0, 10).view(1, 1, 3, 3)
    assert winograd.winograd_input_gradient(gradient, numbers)[0, 0].tolist() == [[2, 4, 6], [8, 10, 12], [14, 16, 18]]
    found = winograd.winograd_weight_gradient(numbers, gradient)
    assert found[0, 0].tolist() == [[2, 4, 6], [8, 10, 12], [14, 16, 18]]


@pytest.mark.parametrize(
    ("channels", "passes"),
    [
        ((4, 4), EVERY_PASS),
        ((2, 4), ["winograd", "weight_gradient"]),
        ((4, 2), ["input_gradient", "weight_gradient"]),
        ((2, 2), ["weight_gradient"]),
        ((1, 4), []),
        ((4, 1), []),
    ],
)
def test_each_pass_by_its_channels(trained, channels, passes):
    """The gradient of the inputs is a convolution of as many channels as the result has."""
    torch.manual_seed(0)
    layer, x = Conv2d(*channels, 3, padding=1), torch.randn(1, channels[0], 3, 4, requires_grad=True)
    own = gradients(lambda x, *_: layer(x), x, layer.weight, layer.bias)
    assert trained == passes
    plain = gradients(lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), x, layer.weight, layer.bias)
    torch.testing.assert_close(own, plain, atol=1e-5, rtol=1e-5)


def test_only_gradients_that_are_wanted(trained):
    layer, x = Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 6, 6)
    layer(x).sum().backward()  # whose gradient has no strides
    assert trained == ["winograd", "weight_gradient"]
    trained.clear()
    layer.requires_grad_(False)(x.requires_grad_()).sum().backward()
    assert trained == ["winograd", "input_gradient"]
    assert x.grad[0, :, 2, 2].tolist() == pytest.approx(layer.weight.sum((0, 2, 3)).tolist(), abs=1e-5)
    trained.clear()
    layer.zero_grad()
    layer.bias.requires_grad_()
    layer(x.detach()).sum().backward()
    assert layer.bias.grad.tolist() == [36] * 4
    assert trained == ["winograd"]


def test_gradients_of_gradients(trained):
    torch.manual_seed(0)
    leaves = [tensor.requires_grad_() for tensor in (torch.randn(1, 4, 5, 6), torch.randn(4, 4, 3, 3), torch.randn(4))]
    found: list[list[Tensor]] = []
    for function in (convolve, lambda *own: F.conv2d(*own, padding=1)):
        y = function(*leaves)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        assert trained == ["winograd"]  # what has a gradient itself is PyTorch's
        found.append([*first, *torch.autograd.grad(sum(own.square().sum() for own in first), leaves)])
        trained[1:] = []
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_under_a_frozen_norm_and_checkpointed(trained):
    """Twice over the same weights, as in DDP; with checkpoints the same bits."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), FrozenBatchNorm2d(4), nn.ReLU(inplace=True))
    network[1].running_var.uniform_(0.5, 2)
    network[1].running_mean.normal_()
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    run = lambda checkpointed: run_stage([network], run_stage([network], x, checkpointed), checkpointed)  # noqa: E731
    expected = gradients(lambda *_: run(False), x, network[0].weight)
    assert trained == []  # without folding the convolution is PyTorch's
    replace_layers(network)
    found = gradients(lambda *_: run(False), x, network[0].weight)
    assert trained == ["winograd"] * 2 + EVERY_PASS[1:] * 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    again = gradients(lambda *_: run(True), x, network[0].weight)
    assert trained.count("winograd") == 6
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, found, strict=True))


def test_not_where_another_type_or_a_compiler_computes(trained):
    layer, x = Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert convolve(x.double(), layer.weight.double(), None).dtype == torch.float64
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x).sum().backward()
    torch.compile(layer, backend="aot_eager")(x).sum().backward()
    layer(x[0]).sum().backward()  # without a batch
    assert trained == []
    layer(x)
    assert trained == ["winograd"]


def test_under_autocast_backward_stays_in_float32(trained):
    """As of a layer that is excepted from autocast, where the backward pass runs within it."""
    torch.manual_seed(0)
    weight, x = torch.randn(4, 4, 3, 3, requires_grad=True), torch.randn(1, 4, 6, 6, requires_grad=True)
    expected = gradients(lambda x, weight: F.conv2d(x, weight, padding=1), x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = convolve(x, weight, None)
        found = torch.autograd.grad(y.square().sum(), [x, weight])
    assert trained == EVERY_PASS
    torch.testing.assert_close([y, *found], expected, atol=1e-4, rtol=1e-5)
