"""Coverage of objects by anchors: windows and IoUs by hand, and equality with what training does, bit by bit."""

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig, AnchorGenerator
from detector.assignment import match
from detector.boxes import is_inside
from detector.sampling import POSITIVE
from experiments.anchors.coverage import all_locations, anchor_lattices, legal_locations, match_objects

TALL = AnchorConfig(scales=[2], aspect_ratios=[4], straddling="drop")  # 16 wide, 64 high
SIZES = np.array([[100, 50], [50, 100]])  # (height, width)


def test_windows_by_hand() -> None:
    # Centres at 8, 24, 40, ...: an anchor 16 wide lies within 50 pixels at the first three of four columns, one 64
    # high within 100 at rows 2 (8..72) and 3 (24..88) of seven, and within 50 nowhere.
    lattices = anchor_lattices(TALL, [16], (100, 100))
    assert (lattices.width.tolist(), lattices.height.tolist()) == ([16.0], [64.0])
    legal, everywhere = legal_locations(lattices, SIZES), all_locations(lattices, SIZES)
    assert legal.first[:, 0, 0].tolist() == [0, 2]  # column and row
    assert legal.last[:, 0, 0].tolist() == [2, 3]
    assert legal.count().tolist() == [[6], [0]]
    assert everywhere.count().tolist() == [[28], [28]]


def test_names_and_strides_of_lattices() -> None:
    for order, names in (
        ("ratio_major", [(1, 3), (2, 3), (1, 0.5), (2, 0.5), (4, 3), (5, 3), (4, 0.5), (5, 0.5)]),
        ("scale_major", [(1, 3), (1, 0.5), (2, 3), (2, 0.5), (4, 3), (4, 0.5), (5, 3), (5, 0.5)]),
    ):
        config = AnchorConfig(scales=[[1, 2], [4, 5]], aspect_ratios=[3, 0.5], order=order)  # type: ignore[arg-type]
        lattices = anchor_lattices(config, [8, 32], (90, 170))
        assert list(zip(lattices.scale.tolist(), lattices.aspect_ratio.tolist(), strict=True)) == names
        assert lattices.level.tolist() == [0] * 4 + [1] * 4
        assert lattices.stride.tolist() == [8] * 4 + [32] * 4
        assert lattices.low.shape == lattices.high.shape == (2, 8, 22)  # columns of the finest level; rows are fewer
        np.testing.assert_allclose(lattices.width * lattices.height, (16 * lattices.scale) ** 2, rtol=1e-6)
        np.testing.assert_allclose(lattices.height / lattices.width, lattices.aspect_ratio, rtol=1e-6)


def matched(boxes: list[list[float]], image: list[int], positive_iou: float = 0.7, best_per_object: bool = True) -> Any:
    lattices = anchor_lattices(TALL, [16], (100, 100))
    box = np.array(boxes, np.float32).reshape(-1, 4)
    return match_objects(
        lattices, legal_locations(lattices, SIZES), box, np.array(image, int), positive_iou, best_per_object
    )


def test_fitted_locations_are_a_stride_apart_at_each_level() -> None:
    """An image of 64 x 64 pixels has 16, 8 and 4 locations a side: 4, 8 and 16 pixels apart, from half of it on."""
    config = AnchorConfig([[1.0], [2.0], [4.0]], [1.0], center_offset="half_stride", spacing="fitted")
    lattices = anchor_lattices(config, (4, 8, 16), (64, 64))
    centers = (lattices.low + lattices.high)[0] / 2
    np.testing.assert_array_equal(centers[:, :3], [[2, 6, 10], [4, 12, 20], [8, 24, 40]])


def test_best_anchor_by_hand() -> None:
    # The anchor (16, 8, 32, 72) overlaps (18, 10, 30, 70) by all of its 12 x 60 pixels, of 16 x 64.
    found = matched([[18, 10, 30, 70]], [0])
    assert found.best_iou.tolist() == [720 / 1024]
    assert found.is_best.tolist() == [[True]]
    assert found.positives.tolist() == [1, 0]
    assert found.positives_of_shape.tolist() == [1]


def test_ties_are_all_positive_and_counted_once() -> None:
    # Both legal rows (8..72 and 24..88) of column 1 hold each of the objects wholly.
    boxes = [[20.0, 30, 28, 60], [22, 40, 28, 60]]
    assert matched(boxes[:1], [0]).positives.tolist() == [2, 0]
    found = matched(boxes, [0, 0])
    assert found.best_iou.tolist() == [240 / 1024, 120 / 1024]
    assert found.positives.tolist() == [2, 0]
    assert matched(boxes, [0, 0], best_per_object=False).positives.tolist() == [0, 0]
    assert matched(boxes, [0, 0], positive_iou=0.2, best_per_object=False).positives.tolist() == [2, 0]


def test_no_anchor_at_all() -> None:
    found = matched([[10, 5, 26, 45], [51, 1, 55, 4]], [1, 1])  # in the image in which none is legal
    assert found.best_iou.tolist() == [0, 0]
    assert not found.is_best.any()
    assert found.positives.tolist() == [0, 0]
    outside_reach = matched([[10, 0, 20, 7]], [0])  # above the first legal row
    assert outside_reach.best_iou.tolist() == [0]
    assert outside_reach.positives.tolist() == [0, 0]


def test_no_objects() -> None:
    found = matched([], [])
    assert found.best_iou.shape == (0,)
    assert found.positives.tolist() == [0, 0]


def random_case(seed: int) -> tuple[AnchorConfig, tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pyramid = seed % 2 == 1
    strides = (4, 8, 16, 32, 64) if pyramid else (int(rng.choice([8, 16])),)
    base_size = float(rng.choice([1, 16]))

    def scales() -> list[float]:
        sides = rng.uniform(4, 500, 2) if rng.random() < 0.5 else rng.choice([8, 16, 32, 128, 256], 2, replace=False)
        return [float(side) / base_size for side in sides]

    config = AnchorConfig(
        scales=[scales() for _ in strides] if pyramid and seed % 4 == 1 else scales(),
        aspect_ratios=[0.5, 1, 2] if rng.random() < 0.5 else rng.uniform(0.2, 4, 2).round(2).tolist(),
        base_size=base_size,
        center_offset=("zero", "half_stride", "half_stride_minus_half")[seed % 3],  # type: ignore[arg-type]
        straddling=("drop", "keep")[seed // 2 % 2],  # type: ignore[arg-type]
        order=("ratio_major", "scale_major")[seed // 3 % 2],  # type: ignore[arg-type]
    )
    sizes = rng.integers((60, 60), (500, 700), (4, 2))
    boxes, image = [], []
    for index, (height, width) in enumerate(sizes.tolist()):
        for _ in range(int(rng.integers(0, 7))):
            corner = rng.uniform(0, 0.95, 2) * (width, height)
            sides = np.exp(rng.uniform(np.log(3), np.log(600), 2))
            if rng.random() < 0.5:
                corner, sides = corner.round(), sides.round()
            boxes.append([*corner, *np.minimum(corner + sides, (width, height))])
            image.append(index)
    return config, strides, sizes, np.array(boxes, np.float32).reshape(-1, 4), np.array(image, np.int64)


@pytest.mark.parametrize("seed", range(24))
def test_equal_to_the_matching_of_training(seed: int) -> None:
    config, strides, sizes, boxes, image = random_case(seed)
    positive_iou, best_per_object = (0.7, 0.5, 0.3)[seed % 3], seed % 5 != 0
    lattices = anchor_lattices(config, strides, tuple(sizes.max(axis=0)))
    used = (legal_locations if config.straddling == "drop" else all_locations)(lattices, sizes)
    found = match_objects(lattices, used, boxes, image, positive_iou, best_per_object)
    generator = AnchorGenerator(config, strides)
    of_shape = np.zeros(len(lattices.level), np.int64)
    for index, (height, width) in enumerate(sizes.tolist()):
        levels = generator([(-(-height // s), -(-width // s)) for s in strides], torch.device("cpu"))
        counts = generator.anchors_per_location
        shape = torch.cat(
            [torch.arange(len(anchors)) % counts[level] + sum(counts[:level]) for level, anchors in enumerate(levels)]
        )
        anchors = torch.cat(levels)
        inside = is_inside(anchors, (height, width))
        legal = legal_locations(lattices, sizes).count()[index]
        assert torch.bincount(shape[inside], minlength=len(legal)).tolist() == legal.tolist()
        if config.straddling == "drop":
            anchors, shape = anchors[inside], shape[inside]
        objects = torch.from_numpy(boxes[image == index])
        kinds = match(anchors, objects, positive_iou, (0.0, 0.3), best_per_object).kind
        assert found.positives[index] == (kinds == POSITIVE).sum()
        of_shape += torch.bincount(shape[kinds == POSITIVE], minlength=len(of_shape)).numpy()
        if len(objects) == 0 or len(anchors) == 0:
            assert not found.best_iou[image == index].any()
            continue
        iou = box_iou(objects, anchors)
        best = iou.max(dim=1).values
        assert torch.equal(torch.from_numpy(found.best_iou[image == index]), best)
        tied = (iou >= best[:, None] * (1 - 1e-5)) & (iou > 0)
        expected = [sorted(set(shape[row].tolist())) for row in tied]
        assert [np.flatnonzero(row).tolist() for row in found.is_best[image == index]] == expected
    assert found.positives_of_shape.tolist() == of_shape.tolist()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config, strides, sizes, boxes, image = random_case(3)
    lattices = anchor_lattices(config, strides, tuple(sizes.max(axis=0)))
    used = all_locations(lattices, sizes)
    whole = match_objects(lattices, used, boxes, image, 0.5, True)
    monkeypatch.setattr("experiments.anchors.coverage.CHUNK", 40)
    cut = match_objects(lattices, used, boxes, image, 0.5, True)
    for name in ("best_iou", "is_best", "positives", "positives_of_shape"):
        assert np.array_equal(getattr(whole, name), getattr(cut, name)), name
    assert whole.positives.sum() > 10
