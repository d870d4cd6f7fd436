"""Pooled features in the form in which convolutions take them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detector.kernels.layout import for_convolutions


def test_a_gpu_has_them_once_in_the_form_of_its_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        pooled = torch.empty(5, 6, 7, 7, device="cuda")
        assert for_convolutions(pooled).dtype == torch.float32
        assert for_convolutions(pooled).is_contiguous(memory_format=torch.channels_last)
        # `torch.autocast` switches itself off where there is no GPU.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
        found = for_convolutions(pooled)
    assert (found.dtype, found.shape, found.stride()) == (torch.bfloat16, (5, 6, 7, 7), (294, 1, 42, 6))


def test_a_cpu_takes_them_as_they_are() -> None:
    pooled = torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert for_convolutions(pooled) is pooled
