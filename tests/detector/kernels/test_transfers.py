"""Copies to and from a device, by the functions that GPUs take, on the CPU."""

import pytest
import torch

from detector.kernels import transfers
from detector.kernels.transfers import constant, joined, rows_of_images, starts_of, true_indices


def test_true_indices_alike_on_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    masks = [torch.rand(n) < share for n, share in ((1, 1.0), (700, 0.02), (33000, 0.5), (40, 0.0), (0, 0.0))]
    expected = [[i for i, chosen in enumerate(mask.tolist()) if chosen] for mask in masks]
    for on_cpu in (True, False):
        monkeypatch.setattr(transfers, "_CPUS", {"cpu"} if on_cpu else set())
        found = true_indices(masks)
        assert [indices.tolist() for indices in found] == expected
        assert {indices.dtype for indices in found} == {torch.int64}


def test_constant_is_as_new_tensor() -> None:
    for like in (torch.zeros(2), torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)):
        assert constant((3, 7), like).equal(like.new_tensor((3, 7)))
        assert constant((3, 7), like).dtype == like.dtype


def test_constants_are_kept_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_CPUS", set())
    like = torch.zeros(1)
    with torch.inference_mode():
        kept = constant((3.0, 7.0), like)
    assert constant((3.0, 7.0), like) is kept
    assert constant((3.0, 7.0), like.double()).dtype == torch.float64
    (kept * torch.ones(2, requires_grad=True)).sum().backward()  # which saves it: it is no tensor of inference alone


def test_indices_and_rows_of_images_after_one_another() -> None:
    parts = [torch.zeros(n) for n in (3, 0, 2)]
    assert starts_of(parts) == [0, 3, 3]
    assert joined([torch.tensor([2, 0]), torch.tensor([1])], [0, 3]).tolist() == [2, 0, 4]
    assert rows_of_images([(1, 2)] * 3, [3, 0, 2], parts[0]).tolist() == [[1, 2]]
    assert rows_of_images([(1, 2), (3, 4), (5, 6)], [2, 0, 1], parts[0]).tolist() == [[1, 2], [1, 2], [5, 6]]
