"""Large-scale jitter: sizes, padding and boxes by hand, and boxes on the pixels that they are of."""

from random import Random
from typing import Any

import numpy as np
import pytest

from datamodules.augmentation.samples import Sample
from datamodules.augmentation.transforms import LargeScaleJitter
from detector.errors import InputError

RED = (255, 0, 0)


def image_of(box: tuple[int, int, int, int], height: int = 40, width: int = 80) -> Sample:
    """A black image with one red object, difficult and of class 7."""
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = RED
    return Sample(image, np.array([box], np.float32), np.array([7]), np.array([True]))


def jittered(sample: Sample, seed: int = 0, **options: Any) -> Sample:
    def no_partner() -> Sample:
        raise AssertionError("no partner is needed")

    return LargeScaleJitter(**options)(sample, Random(seed), no_partner)


def test_a_small_factor_pads() -> None:
    """80 x 40 pixels by 0.5 * 100 / 80 are 50 x 25 in the upper left corner of 100 x 100."""
    found = jittered(image_of((8, 8, 48, 32)), size=100, scales=[0.5, 0.5])
    assert found.image.shape == (100, 100, 3) and found.image.dtype == np.uint8
    assert found.boxes.tolist() == [[5, 5, 30, 20]]
    assert (found.labels.tolist(), found.difficult.tolist()) == ([7], [True])
    np.testing.assert_array_equal(found.image[6:19, 6:29], np.broadcast_to(RED, (13, 23, 3)))
    assert not found.image[:25, 31:50].any()
    padding = np.broadcast_to(LargeScaleJitter.PADDING, (100, 100, 3))
    np.testing.assert_array_equal(found.image[25:], padding[25:])
    np.testing.assert_array_equal(found.image[:, 50:], padding[:, 50:])


def test_factor_one_fills_the_square_by_the_longer_side() -> None:
    found = jittered(image_of((0, 10, 80, 40)), scales=[1, 1])
    assert found.image.shape == (80, 80, 3)
    assert found.boxes.tolist() == [[0, 10, 80, 40]]
    np.testing.assert_array_equal(found.image[:40], image_of((0, 10, 80, 40)).image)


@pytest.mark.parametrize("seed", range(12))
def test_a_large_factor_crops_and_boxes_follow_the_pixels(seed: int) -> None:
    """Of 160 x 80 pixels 80 are seen in x and all in y: the object of 40 x 40 pixels, from x 40 on, moves left."""
    found = jittered(image_of((20, 10, 40, 30)), seed, scales=[2, 2])
    assert found.image.shape == (80, 80, 3)
    assert not (found.image == LargeScaleJitter.PADDING).all(axis=2).any()
    red = found.image[..., 0] > 127
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    if len(columns) < 10:  # less than a quarter is seen
        assert len(found.boxes) == 0
        return
    assert found.boxes[0].tolist() == [columns[0], 20, columns[-1] + 1, 60] and (rows[0], rows[-1]) == (20, 59)
    assert found.boxes[0, 2] - found.boxes[0, 0] == 40 or 0 in (found.boxes[0, 0], 80 - found.boxes[0, 2])


def test_places_and_factors_differ() -> None:
    found = [jittered(image_of((20, 10, 40, 30)), seed) for seed in range(300)]
    wide = [sample.boxes[0, 2] - sample.boxes[0, 0] for sample in found if len(sample.boxes)]
    assert 2 <= min(wide) < 3 and 38 < max(wide) <= 40  # 20 pixels by 0.1 to 2
    assert sum(sample.boxes[0, 0] == 0 for sample in found if len(sample.boxes)) > 5  # cut at the left
    lost = sum(not len(jittered(image_of((0, 10, 10, 30)), seed).boxes) for seed in range(100))
    assert 20 < lost < 60  # at the left edge, where about half of the images are enlarged


def test_an_object_that_becomes_smaller_than_a_pixel_is_dropped() -> None:
    assert not len(jittered(image_of((20, 10, 24, 14)), scales=[0.1, 0.1]).boxes)
    assert len(jittered(image_of((20, 10, 30, 20)), scales=[0.1, 0.1]).boxes) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0; it must be a number of pixels, or null"),
        ({"size": "large"}, "size is 'large'"),
        ({"scales": [2, 1]}, r"scales is \[2, 1\]; it must be \[least, greatest\] from 0.01 to 10"),
        ({"scales": [0, 1]}, r"scales is \[0, 1\]"),
        ({"p": 2}, "p is 2"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LargeScaleJitter(**options)
