"""Box arithmetic against numbers worked out by hand; sides are unequal, so that a swap of x and y shows."""

import math

import pytest
import torch
from torch import Tensor

from detector.boxes import MAX_LOG_RATIO, centers_and_sides, clip, decode, encode, has_sides_of, is_inside

LN2 = math.log(2)


def random_boxes(count: int, seed: int = 0) -> Tensor:
    """Boxes (count, 4) with sides of 5 to 305 pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner, sides = (torch.rand(count, 2, generator=generator) * 300 for _ in range(2))
    return torch.cat((corner, corner + sides + 5), dim=1)


def test_centers_and_sides() -> None:
    centers, sides = centers_and_sides(torch.tensor([10.0, 20.0, 50.0, 30.0]))
    assert (centers.tolist(), sides.tolist()) == ([30.0, 25.0], [40.0, 10.0])


def test_deltas_by_hand() -> None:
    # A reference 40 wide and 20 high around (30, 30), a box 40 wide and 10 high around (46, 41).
    reference, box = torch.tensor([[10.0, 20.0, 50.0, 40.0]]), torch.tensor([[26.0, 36.0, 66.0, 46.0]])
    torch.testing.assert_close(encode(box, reference), torch.tensor([[0.4, 0.55, 0.0, -LN2]]))
    scaled = encode(box, reference, std=(0.1, 0.05, 0.2, 0.4))
    torch.testing.assert_close(scaled, torch.tensor([[4.0, 11.0, 0.0, -LN2 / 0.4]]))


def test_boxes_by_hand() -> None:
    # 40 x 20 around (30, 30): the centre moves by 0.25 * 40 and -0.5 * 20, the sides become 80 and 5.
    reference = torch.tensor([[10.0, 20.0, 50.0, 40.0]])
    deltas, box = torch.tensor([[0.25, -0.5, LN2, -2 * LN2]]), torch.tensor([[0.0, 17.5, 80.0, 22.5]])
    torch.testing.assert_close(decode(deltas, reference), box)
    std = (0.5, 0.25, 0.1, 2.0)
    torch.testing.assert_close(decode(deltas / torch.tensor(std), reference, std), box)


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.2, 0.3, 0.4)])
def test_decode_inverts_encode(std: tuple[float, float, float, float]) -> None:
    boxes, references = random_boxes(200), random_boxes(200, seed=1)
    torch.testing.assert_close(decode(encode(boxes, references, std), references, std), boxes, atol=1e-3, rtol=1e-5)


def test_growth_is_clamped_at_log_of_1000_over_16() -> None:
    assert pytest.approx(4.1351665567) == MAX_LOG_RATIO
    reference = torch.tensor([[0.0, 0.0, 16.0, 8.0]])
    wide = decode(torch.tensor([[0.0, 0.0, 50.0, 0.0]]), reference)[0]
    high = decode(torch.tensor([[0.0, 0.0, 0.0, 50.0]]), reference)[0]
    torch.testing.assert_close(wide, torch.tensor([-492.0, 0.0, 508.0, 8.0]))  # 16 * 62.5 = 1000
    torch.testing.assert_close(high, torch.tensor([0.0, -246.0, 16.0, 254.0]))  # 8 * 62.5 = 500
    # The limit holds after the multiplication by std, and shrinking has none.
    scaled = decode(torch.tensor([[0.0, 0.0, 10.0, -50.0]]), reference, std=(1.0, 1.0, 0.2, 0.2))[0]
    assert float(scaled[2] - scaled[0]) == pytest.approx(16 * math.exp(2))
    assert float(scaled[3] - scaled[1]) == pytest.approx(8 * math.exp(-10), abs=1e-6)


def test_boxes_are_float32_whatever_the_deltas_are() -> None:
    deltas = torch.tensor([[0.3, -0.2, 0.1, 0.7]], dtype=torch.bfloat16)
    reference = torch.tensor([[301.0, 407.0, 555.0, 602.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = decode(deltas, reference)
        back = encode(boxes, reference)
    assert boxes.dtype == back.dtype == torch.float32
    torch.testing.assert_close(boxes.double(), decode(deltas.float(), reference).double(), rtol=0, atol=0)
    torch.testing.assert_close(back, deltas.float(), atol=1e-5, rtol=0)


def test_clip_to_height_and_width() -> None:
    boxes = torch.tensor([[-5.0, -7.0, 300.0, 300.0], [10.0, 20.0, 30.0, 40.0], [120.0, 60.0, 130.0, 70.0]])
    clipped = clip(boxes, (50, 100))
    assert clipped.tolist() == [[0, 0, 100, 50], [10, 20, 30, 40], [100, 50, 100, 50]]


def test_sides_are_compared_one_by_one() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 9.0], [0.0, 0.0, 9.0, 4.0], [1.0, 2.0, 6.0, 7.0]])
    assert has_sides_of(boxes, 5).tolist() == [False, False, True]
    assert has_sides_of(boxes, 4).tolist() == [True, True, True]


def test_inside_includes_the_border() -> None:
    boxes = torch.tensor(
        [[0.0, 0.0, 100.0, 50.0], [-0.1, 0.0, 9.0, 9.0], [0.0, -0.1, 9.0, 9.0], [0, 0, 100.1, 9], [0, 0, 9, 50.1]]
    )
    assert is_inside(boxes, (50, 100)).tolist() == [True, False, False, False, False]
    assert not is_inside(torch.tensor([[0.0, 0.0, 60.0, 20.0]]), (100, 50)).any()


def test_mean_and_std_of_deltas_by_hand() -> None:
    """An object half its width to the right of the reference, twice as wide and half as high."""
    reference, box = torch.tensor([[0.0, 0.0, 20.0, 40.0]]), torch.tensor([[0.0, 10.0, 40.0, 30.0]])
    std, mean = (0.1, 0.2, 0.5, 0.25), (0.25, -0.1, 0.2, 0.3)
    plain = torch.tensor([[0.5, 0.0, math.log(2), -math.log(2)]])
    torch.testing.assert_close(encode(box, reference), plain)
    expected = torch.tensor([[2.5, 0.5, (math.log(2) - 0.2) / 0.5, (-math.log(2) - 0.3) / 0.25]])
    torch.testing.assert_close(encode(box, reference, std, mean), expected)
    torch.testing.assert_close(decode(expected, reference, std, mean), box, atol=1e-5, rtol=0)
