"""Which special paths layers take: by the processor's instructions or by name, and what none of them means."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detector.errors import InputError
from detector.kernels import cpu_paths, processor
from detector.kernels.cpu_paths import cpu_kernels, use_cpu_kernels
from detector.kernels.onednn import Conv2d, Linear
from detector.kernels.strips import worth_strips

AVX512 = {"sse4_1", "avx", "avx2", "avx512_f", "avx512_bf16"}


@pytest.fixture(autouse=True)
def choice(monkeypatch) -> None:
    """Is undone after each test."""
    monkeypatch.setattr(cpu_paths, "_chosen", "auto")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("flags", "instructions", "name"),
    [
        ({"sse4_1", "avx", "avx2", "avx_vnni"}, "avx2", "winograd"),
        (AVX512, "avx512_bf16", "onednn"),
        (AVX512 - {"avx512_bf16"}, "avx512", "onednn"),
        (AVX512 | {"amx_bf16"}, "amx", "onednn"),
        ({"neon", "bf16"}, "neon_bf16", "onednn"),
        (set(), "unknown", "onednn"),
    ],
)
def test_by_the_processor(monkeypatch, flags, instructions, name) -> None:
    monkeypatch.setattr(processor, "_processor_flags", lambda: frozenset(flags))
    assert use_cpu_kernels("auto") == f"cpu_kernels auto: {name}, this processor's instructions are {instructions}"
    assert cpu_kernels() == name


def test_onednns_limit_counts(monkeypatch) -> None:
    monkeypatch.setattr(processor, "_processor_flags", lambda: frozenset(AVX512))
    assert cpu_kernels() == "onednn"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert cpu_kernels() == "winograd"


@pytest.mark.parametrize("name", ["winograd", "onednn", "plain"])
def test_by_name(monkeypatch, name) -> None:
    monkeypatch.setattr(processor, "_processor_flags", lambda: frozenset({"avx2"}))
    assert use_cpu_kernels(name) == f"cpu_kernels {name}"
    assert cpu_kernels() == name
    with pytest.raises(InputError, match=r"^cpu_kernels fast: choose auto, winograd, onednn, plain"):
        use_cpu_kernels("fast")  # type: ignore[arg-type]
    assert cpu_kernels() == name


class Functions(TorchDispatchMode):
    """Names of the functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(
    ("name", "untrained", "trained"),
    [
        ("winograd", "mkldnn::_linear_pointwise", "mkldnn::_linear_pointwise"),
        ("onednn", "mkldnn::_linear_pointwise", "aten::convolution"),
        ("plain", "aten::convolution", "aten::convolution"),
    ],
)
def test_what_a_layer_calls(name, untrained, trained) -> None:
    """Of a convolution that Winograd's algorithm computes by products of matrices."""
    use_cpu_kernels(name)
    layer, x = Conv2d(128, 256, 3, padding=1), torch.randn(1, 128, 20, 25)
    results = []
    for expected in (trained, untrained):
        with Functions() as functions:
            results.append(layer(x))
        assert {function for function in functions.names if "conv" in function or "mkldnn" in function} == {expected}
        layer.requires_grad_(False)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_plain_is_pytorchs_alone() -> None:
    block, layer = [Conv2d(3, 64, 3, padding=1), nn.MaxPool2d(2, 2, ceil_mode=True)], Linear(6, 4)
    images = torch.empty(1, 3, 700, 800)
    with torch.no_grad():
        assert worth_strips(block, images)
        use_cpu_kernels("plain")
        assert not worth_strips(block, images)
    with Functions() as functions:
        layer(torch.randn(2, 6)).sum().backward()
        with torch.no_grad():
            layer(torch.randn(2, 6))
    assert not [function for function in functions.names if "mkldnn" in function]
