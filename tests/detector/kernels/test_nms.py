"""NMS of groups side by side: what torchvision's operator keeps of each."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from detector.kernels import nms as own
from detector.kernels.nms import nms_in_groups


def groups(number: int, size: int, crowded: float) -> tuple[Tensor, Tensor]:
    """Return boxes (number, size, 4), the closer together the more crowded, and which are usable: most."""
    rng = torch.Generator().manual_seed(number * size)
    corners = 100 / crowded * torch.rand(number, size, 2, generator=rng)
    sides = 20 + 20 * torch.rand(number, size, 2, generator=rng)
    sides[:, ::17] = 0  # points
    return torch.cat((corners, corners + sides), 2), torch.rand(number, size, generator=rng) < 0.9


def kept_one_by_one(boxes: Tensor, usable: Tensor, iou: float) -> Tensor:
    kept = torch.zeros_like(usable)
    for group, (own_boxes, mask) in enumerate(zip(boxes, usable, strict=True)):
        (places,) = torch.where(mask)
        kept[group, places[nms(own_boxes[places], -places.float(), iou)]] = True
    return kept


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("number", "size", "crowded"), [(1, 1, 1.0), (3, 40, 1.0), (2, 300, 8.0), (5, 150, 0.2)])
def test_keeps_what_torchvision_keeps(number: int, size: int, crowded: float, iou: float) -> None:
    boxes, usable = groups(number, size, crowded)
    assert torch.equal(nms_in_groups(boxes, usable, iou), kept_one_by_one(boxes, usable, iou))


@pytest.mark.parametrize("name", ["LARGEST", "_PAIRS"])
def test_large_groups_and_many_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, usable = groups(4, 60, 3.0)
    expected = nms_in_groups(boxes, usable, 0.5)
    assert 0 < expected.sum() < usable.sum()
    monkeypatch.setattr(own, name, 2 * 60**2 if name == "_PAIRS" else 59)
    assert torch.equal(nms_in_groups(boxes, usable, 0.5), expected)


def test_a_chain_longer_than_the_rounds() -> None:
    """Each box overlaps its neighbours alone, so every second one stays, however long the chain is."""
    x1 = 10.0 * torch.arange(101)
    boxes = torch.stack((x1, torch.zeros(101), x1 + 15, torch.ones(101)), 1)[None]
    kept = nms_in_groups(boxes, torch.ones(1, 101, dtype=torch.bool), 0.1)
    assert kept[0].tolist() == [place % 2 == 0 for place in range(101)]
    unusable = torch.ones(1, 101, dtype=torch.bool)
    unusable[0, 50] = False  # the chain begins anew behind it
    kept = nms_in_groups(boxes, unusable, 0.1)
    assert kept[0].tolist() == [place % 2 == (0 if place < 50 else 1) and place != 50 for place in range(101)]


def test_nothing_to_keep() -> None:
    for shape in ((0, 5), (3, 0)):
        assert nms_in_groups(torch.zeros(*shape, 4), torch.ones(shape, dtype=torch.bool), 0.5).shape == shape
    assert not nms_in_groups(torch.rand(2, 4, 4), torch.zeros(2, 4, dtype=torch.bool), 0.5).any()
