"""Convolutions and pooling in strips of rows: the numbers of whole maps, and no map as large as these."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.backbones.vgg16 import VGG16Body
from detector.kernels import checkpointing, strips
from detector.kernels.precision import replace_layers

NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "no norm": None,
    "frozen norm": partial(FrozenBatchNorm2d, eps=1e-5),
    "norm in evaluation": nn.BatchNorm2d,
}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Sizes of the maps that were asked for in strips."""
    sizes: list[tuple[int, ...]] = []
    compute = checkpointing.pooled_in_strips
    monkeypatch.setattr(
        checkpointing, "pooled_in_strips", lambda block, x: sizes.append(tuple(x.shape)) or compute(block, x)
    )
    return sizes


def build(norm: Callable[[int], nn.Module] | None) -> VGG16Body:
    torch.manual_seed(0)
    body = VGG16Body(norm).eval().to(memory_format=torch.channels_last)
    replace_layers(body)
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_()
    return body


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(96, 64), (77, 83), (33, 17)])
def test_numbers_of_whole_maps(calls, monkeypatch, norm, dtype, size):
    """Strips of 16 rows of the first maps; sizes that pooling rounds up as well. Kernels may differ, and with them
    rounding."""
    body, images = build(NORMS[norm]), torch.randn(2, 3, *size)
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        (whole,) = body(images)
        assert calls == []
        monkeypatch.setattr(strips, "_STRIP", 20 * size[1] * 64 * dtype.itemsize)  # 16 rows and 2 beyond at each end
        (found,) = body(images)
    assert calls[0] == (2, 3, *size)
    assert found.dtype == whole.dtype == dtype
    assert found.stride() == whole.stride()
    assert len(found.unique()) > 100
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, whole, atol=tolerance, rtol=tolerance)


def test_no_map_is_larger_than_a_strip(calls):
    """568 x 800: layer by layer the first two take 116 MB each. Four strips would fit without what borders need."""
    body, largest = build(None), [0]

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        largest[0] = max(largest[0], output.numel() * output.element_size())

    for layer in body.features:
        layer.register_forward_hook(note)
    with torch.inference_mode():
        body(torch.randn(1, 3, 568, 800))
    assert [size[1:] for size in calls] == [(3, 568, 800), (64, 284, 400)]
    assert 20 * 2**20 < largest[0] <= 28 * 2**20


def test_only_where_nothing_is_trained(calls, monkeypatch):
    monkeypatch.setattr(strips, "_STRIP", 1)
    body, images = build(None).train(), torch.randn(1, 3, 64, 64)
    body(images)
    assert calls == []  # gradients
    for module in body.stages()[0]:
        module.requires_grad_(False)
    (features,) = body(images)
    assert [size[1] for size in calls] == [3]  # the frozen stage, in training too
    features.sum().backward()
    assert body.features[5].weight.grad.abs().sum() > 0
    assert body.features[0].weight.grad is None
    body(images.requires_grad_())
    assert len(calls) == 1  # the images have one
    normed = build(nn.BatchNorm2d)
    with torch.no_grad():
        normed.train()(images)
        assert len(calls) == 1  # statistics of whole maps
        normed.eval()(images)
    assert [size[1] for size in calls[1:]] == [3, 64, 128, 256]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_not_in_graphs(calls, monkeypatch):
    monkeypatch.setattr(strips, "_STRIP", 1)
    with torch.no_grad():
        torch.jit.trace(build(None), torch.randn(1, 3, 32, 32), check_trace=False)  # which would compute it untraced
        torch.export.export(build(None), (torch.randn(1, 3, 32, 32),))
    assert calls == []
