"""Convolutions and fully connected layers by oneDNN: PyTorch's numbers, whichever of its functions are called."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.kernels import cpu_paths, processor
from detector.kernels.onednn import Conv2d, Linear
from detector.kernels.precision import replace_layers

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_paths, "_chosen", "onednn")


class Functions(TorchDispatchMode):
    """Names of oneDNN's own functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [function.name().split(".")[0]] if "mkldnn" in function.name() else []
        return function(*args, **(kwargs or {}))


def layer_and_copy(*sizes: int, **options: bool) -> tuple[Linear, nn.Linear]:
    torch.manual_seed(0)
    ours, theirs = Linear(*sizes, **options), nn.Linear(*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@needs_onednn
def test_a_fully_connected_layer() -> None:
    ours, theirs = layer_and_copy(50, 20)
    for rois in (0, 1, 37):
        x = torch.randn(rois, 50)
        with Functions() as functions:
            found = ours(x)
        assert functions.names == ["mkldnn::_linear_pointwise"] * (rois > 0)
        torch.testing.assert_close(found, theirs(x))


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_fully_connected_layer(bias: bool) -> None:
    """Of first and second order, those of PyTorch."""
    layers = layer_and_copy(9, 5, bias=bias)
    x = torch.randn(7, 9, requires_grad=True)
    found = []
    for layer in layers:
        y = layer(x).relu()
        leaves = [x, *layer.parameters()]
        first = torch.autograd.grad(y.sum(), leaves, create_graph=True)  # of a gradient without strides
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, layer.weight])
        found.append([y, *first, *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0
    layers[0].weight.requires_grad_(False)
    (alone,) = torch.autograd.grad(layers[0](x).relu().sum(), [x])
    torch.testing.assert_close(alone, found[1][1])


def test_training_steps_are_those_of_pytorch() -> None:
    """Gradients accumulate."""
    layers = layer_and_copy(6, 4)
    for x in (torch.randn(3, 6), torch.randn(5, 6)):
        for layer in layers:
            layer(x).relu().square().sum().backward()
    for ours, theirs in zip(*(layer.parameters() for layer in layers), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("why", ["plain", "double", "autocast", "no oneDNN"])
def test_where_pytorch_computes(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    ours, theirs = layer_and_copy(6, 4)
    x = torch.randn(3, 6)
    if why == "plain":
        monkeypatch.setattr(cpu_paths, "_chosen", "plain")
    if why == "double":
        ours, theirs, x = ours.double(), theirs.double(), x.double()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast")
    with torch.backends.mkldnn.flags(enabled=why != "no oneDNN"), autocast, Functions() as functions:
        found, expected = ours(x), theirs(x)
    assert functions.names == []
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_exported_networks_hold_no_private_function() -> None:
    network = nn.Sequential(Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), Linear(144, 2))
    with torch.no_grad():
        graph = torch.export.export(network, (torch.randn(1, 3, 8, 8),)).graph
    assert "mkldnn" not in str(graph)
    assert "linear" in str(graph)


@pytest.mark.parametrize("way", ["oneDNN", "no instructions", "any device", "norm by itself", "compiled"])
@pytest.mark.parametrize("training", [False, True])
def test_constants_of_a_frozen_norm_are_not_rounded(monkeypatch: pytest.MonkeyPatch, way: str, training: bool) -> None:
    """1000 - 998.5, where bfloat16 knows 1000 and 996: its numbers are 4 apart there."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), FrozenBatchNorm2d(1, eps=0.0))
    nn.init.ones_(network[0].weight)
    network[1].running_mean.fill_(998.5)
    if way != "norm by itself":
        replace_layers(network)
    if way == "no instructions":
        monkeypatch.setattr(processor, "_processor_flags", lambda: frozenset({"avx2"}))
    run = torch.compile(network, backend="aot_eager") if way == "compiled" else network
    x = torch.full((2, 1, 4, 4), 1000.0)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.set_grad_enabled(training),
        torch.backends.mkldnn.flags(enabled=way in ("oneDNN", "no instructions")),
    ):
        y = run(x)
    assert y.dtype == torch.bfloat16
    assert y.float().unique().tolist() == [1.5]
    if training:
        (gradient,) = torch.autograd.grad(y.float().sum(), network[0].weight)
        assert gradient.item() == 32 * 1000


def test_a_trained_bias_is_rounded_as_autocast_rounds_it() -> None:
    """1000 - 998.5 once more: of a convolution without a norm PyTorch makes 1000 - 1000."""
    layer = Conv2d(1, 1, 1)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.bias, -998.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.full((1, 1, 2, 2), 1000.0)).unique().tolist() == [0.0]
