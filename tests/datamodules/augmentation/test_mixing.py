"""Steps that mix several images: what each of them shows, and which objects it brings along."""

import numpy as np
import pytest

from datamodules.augmentation.mixing import CopyPasteBoxes, MixUp, Mosaic
from datamodules.augmentation.recipes import Recipe


@pytest.fixture
def grey(sample_of):
    """`grey(value, height, width, boxes)`: an image of one grey."""
    return lambda value, height, width, boxes: sample_of(boxes, np.full((height, width, 3), value, np.uint8))


def apply(step, sample, seed, partner):
    return Recipe([step])(sample, np.random.SeedSequence((seed,)), partner)[0]


def test_mosaic_shows_four_images_and_keeps_the_aspect_ratio(grey):
    partners = iter([grey(80, 20, 90, [[0, 0, 90, 20]]), grey(140, 70, 30, []), grey(200, 40, 40, [])])
    sample = grey(20, 40, 60, [[0, 0, 60, 40]])
    out = apply(Mosaic(canvas=1.5, p=1), sample, 5, partner=lambda _: next(partners))
    assert out.size == (60, 90)
    shares = {value: (out.image == value).mean() for value in (20, 80, 140, 200)}
    assert sum(shares.values()) == 1 and min(shares.values()) > 0.1
    for box, value in zip(out.boxes.astype(int), (20, 80), strict=False):  # cut to its tile, and the whole of it
        assert (out.image[box[1] : box[3], box[0] : box[2]] == value).all()
        assert (box[2] - box[0]) * (box[3] - box[1]) == round(shares[value] * 60 * 90)


def test_mixup_blends_and_keeps_all_objects(grey):
    sample, partner = grey(200, 40, 60, [[5, 5, 20, 30]]), grey(0, 80, 80, [[0, 0, 80, 80], [20, 40, 60, 80]])
    out = apply(MixUp(min_scale=1, p=1), sample, 1, partner=lambda _: partner)
    assert out.size == (40, 60) and len(out.boxes) == 3
    x1, y1, x2, y2 = out.boxes[1].astype(int)  # the partner's whole area: 40 x 40
    assert (x2 - x1, y2 - y1) == (40, 40)
    blended = out.image[y1:y2, x1:x2]
    assert 60 < blended.min() == blended.max() < 140
    assert (np.delete(out.image, np.s_[x1:x2], axis=1) == 200).all()
    np.testing.assert_allclose(out.boxes[2], [x1 + 10, 20, x1 + 30, 40])
    np.testing.assert_array_equal(out.boxes[0], sample.boxes[0])
    # Of 20 x 40 pixels one and a half times as many fit into the width of 60.
    wide = apply(MixUp(min_scale=1, p=1), sample, 1, partner=lambda _: grey(0, 20, 40, [[0, 0, 40, 20]]))
    x1, y1, x2, y2 = wide.boxes[1]
    assert (x2 - x1, y2 - y1) == (60, 30)


def test_copy_paste_brings_objects_along_and_covers_little(sample_of, grey):
    other = np.zeros((50, 50, 3), np.uint8)
    other[10:30, 10:30] = 250
    partner = sample_of([[10, 10, 30, 30], [22, 22, 28, 28]], other)
    sample = grey(20, 60, 80, [[0, 0, 40, 60]])
    pasted = 0
    for number in range(30):
        step = CopyPasteBoxes(objects=1, max_cover=0.1, scale=(1, 1), p=1)
        out = apply(step, sample, number, partner=lambda _: partner)
        np.testing.assert_array_equal(out.boxes[0], sample.boxes[0])
        assert (out.image[:, :40] != 20).any(2).mean() <= 0.1
        for box, label in zip(out.boxes[1:].astype(int), out.labels[1:], strict=True):
            pasted += 1
            assert label in (1, 2)
            inside = out.image[box[1] : box[3], box[0] : box[2]]
            assert (inside == 250).mean() > 0.9
    assert pasted > 30  # with the large object the small one within it


def test_copy_paste_leaves_the_image_alone_where_there_is_no_room(grey):
    sample = grey(20, 60, 80, [[0, 0, 80, 60]])
    partner = grey(250, 60, 80, [[0, 0, 80, 60]])
    out = apply(CopyPasteBoxes(max_cover=0, p=1), sample, 0, partner=lambda _: partner)
    np.testing.assert_array_equal(out.image, sample.image)
    assert len(out.boxes) == 1


def test_copy_paste_counts_what_earlier_pastes_covered(grey):
    """Each patch covers a fifth of the object that fills the image; a second one would cover more than 0.3."""
    sample = grey(20, 50, 40, [[0, 0, 40, 50]])
    partner = grey(250, 50, 40, [[0, 0, 20, 20], [20, 0, 40, 20], [0, 30, 20, 50]])
    step = CopyPasteBoxes(objects=3, max_cover=0.3, scale=(1, 1), max_side=1, margin=0, p=1)
    for number in range(20):
        out = apply(step, sample, number, partner=lambda _: partner)
        assert len(out.boxes) == 2 and (out.image == 250).all(2).sum() == 400
