"""A convolution or fully connected layer with its ReLU: in one pass without gradients, the same numbers as in two."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detector.backbones.batch_norm import FrozenBatchNorm2d, fold_frozen_norms
from detector.kernels import onednn
from detector.kernels.onednn import ConvReLU2d, bfloat16_runs, linear_relu


@pytest.fixture
def fused(monkeypatch) -> list[bool]:
    """Which calls were in one pass."""
    answers: list[bool] = []
    decide = onednn._in_one_pass
    monkeypatch.setattr(onednn, "_in_one_pass", lambda *a: answers.append(decide(*a)) or answers[-1])
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": (2, 1), "bias": False}, {"groups": 2, "dilation": 2}])
def test_convolution(fused, options, dtype):
    layer = ConvReLU2d(4, 6, (3, 1) if "stride" in options else 3, **options)
    x = torch.randn(2, 4, 11, 14).contiguous(memory_format=torch.channels_last)
    expected = F.relu(nn.Conv2d.forward(layer, x))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = layer(x)
    assert fused == [dtype == torch.float32 or bfloat16_runs()]
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert 0.2 < float((found == 0).float().mean()) < 0.8
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rois", [0, 1, 37])
def test_fully_connected_layer(fused, rois, dtype):
    layer, x = nn.Linear(50, 20), torch.randn(rois, 50)
    expected = F.relu(layer(x))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = linear_relu(layer, x)
    assert fused == [rois > 0 and (dtype == torch.float32 or bfloat16_runs())]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_two_passes(fused, frozen):
    """Of the weights, and through frozen weights of the input."""
    torch.manual_seed(0)
    conv, layer = ConvReLU2d(3, 4, 3).requires_grad_(not frozen), nn.Linear(4, 16)
    x = torch.randn(2, 3, 9, 7, requires_grad=frozen)
    leaves = [x, layer.weight] if frozen else [conv.weight, conv.bias, layer.weight, layer.bias]
    one = linear_relu(layer, conv(x).mean((2, 3)))
    two = F.relu(layer(F.relu(nn.Conv2d.forward(conv, x)).mean((2, 3))))
    assert fused == [False, False]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (one, two)), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_fully_connected_layer(bias):
    """Of first and second order, those of PyTorch."""
    torch.manual_seed(0)
    layer, x = nn.Linear(9, 5, bias=bias), torch.randn(7, 9, requires_grad=True)
    leaves = [x, *layer.parameters()]
    found = []
    for function in (linear_relu, lambda layer, x: F.relu(layer(x))):
        y = function(layer, x)
        first = torch.autograd.grad(y.sum(), leaves, create_graph=True)  # of a gradient without strides
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, layer.weight])
        found.append([y, *first, *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0
    layer.weight.requires_grad_(False)
    (alone,) = torch.autograd.grad(linear_relu(layer, x).sum(), [x])
    torch.testing.assert_close(alone, found[1][1])


def test_training_steps_are_those_of_pytorch():
    """Gradients accumulate, and frozen and missing ones are left alone."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    copy = nn.Linear(6, 4)
    copy.load_state_dict(layer.state_dict())
    for x in (torch.randn(3, 6), torch.randn(5, 6)):
        linear_relu(layer, x).square().sum().backward()
        F.relu(copy(x)).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_layers_of_a_training_have_one_pass(fused):
    ConvReLU2d(3, 4, 3).requires_grad_(False)(torch.randn(2, 3, 9, 7))
    assert fused == [True]


def test_switched_off_with_onednn(fused):
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        linear_relu(nn.Linear(3, 3), torch.randn(2, 3))
    assert fused == [False]


def test_processors_without_bfloat16_have_two_passes(fused, monkeypatch):
    monkeypatch.setattr(onednn, "bfloat16_runs", lambda: False)
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear_relu(layer, x).dtype == torch.bfloat16
    with torch.no_grad():
        linear_relu(layer, x)
    assert fused == [False, True]


def test_double_precision_has_two_passes(fused):
    with torch.no_grad():
        assert linear_relu(nn.Linear(3, 3).double(), torch.randn(2, 3).double()).dtype == torch.float64
    assert fused == [False]


def test_compiled_and_exported_networks_hold_no_private_function():
    network = nn.Sequential(ConvReLU2d(3, 4, 3), nn.Flatten())
    with torch.no_grad():
        graph = torch.export.export(network, (torch.randn(1, 3, 8, 8),)).graph
    assert "mkldnn" not in str(graph)
    assert "relu" in str(graph)


@pytest.mark.parametrize("way", ["oneDNN", "any device", "norm by itself", "compiled"])
@pytest.mark.parametrize("training", [False, True])
def test_constants_of_a_frozen_norm_are_not_rounded(way, training):
    """1000 - 998.5, where bfloat16 knows 1000 and 996: its numbers are 4 apart there."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), FrozenBatchNorm2d(1, eps=0.0))
    nn.init.ones_(network[0].weight)
    network[1].running_mean.fill_(998.5)
    if way != "norm by itself":
        fold_frozen_norms(network)
    run = torch.compile(network, backend="aot_eager") if way == "compiled" else network
    x = torch.full((2, 1, 4, 4), 1000.0)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.set_grad_enabled(training),
        torch.backends.mkldnn.flags(enabled=way == "oneDNN"),
    ):
        y = run(x)
    assert y.dtype == torch.bfloat16
    assert y.float().unique().tolist() == [1.5]
    if training:
        (gradient,) = torch.autograd.grad(y.float().sum(), network[0].weight)
        assert gradient.item() == 32 * 1000
