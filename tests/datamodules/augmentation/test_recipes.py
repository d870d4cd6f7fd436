"""Recipes: boxes lie on the pixels of their objects, in the image, with their class; the seed decides everything."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.augmentation.mixing import CopyPasteBoxes, MixUp, Mosaic
from datamodules.augmentation.recipes import AUGMENTATIONS, Recipe, build_augmentation
from datamodules.augmentation.samples import Sample, place
from datamodules.augmentation.transforms import ColorJitter, HorizontalFlip, LargeScaleJitter, MinIoUCrop, MultiScale

GEOMETRIC = {  # without colours, so that pixels tell the class
    "flip": [HorizontalFlip(p=0.5)],
    "ssd_crop": [MinIoUCrop(), HorizontalFlip(p=0.5)],
    "multiscale": [HorizontalFlip(p=0.5), MultiScale()],
    "lsj": [LargeScaleJitter(scales=(0.4, 2)), HorizontalFlip(p=0.5)],
    "mosaic": [Mosaic(p=1), HorizontalFlip(p=0.5)],
    "mixup": [MixUp(p=1), HorizontalFlip(p=0.5)],
    "copy_paste_boxes": [CopyPasteBoxes(p=1), HorizontalFlip(p=0.5)],
    "list": [
        *build_augmentation(
            [
                {"class_path": "albumentations.HorizontalFlip", "init_args": {"p": 0.5}},
                {"class_path": "albumentations.RandomSizedBBoxSafeCrop", "init_args": {"height": 50, "width": 70}},
                {"class_path": "albumentations.VerticalFlip"},
            ]
        ).steps
    ],
    "torchvision": [
        *build_augmentation(
            [
                {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip"},
                {"class_path": "torchvision.transforms.v2.RandomIoUCrop"},
                {
                    "class_path": "torchvision.transforms.v2.RandomCrop",
                    "init_args": {"size": [30, 40], "pad_if_needed": True},
                },
            ]
        ).steps
    ],
}


def _seed(*entropy):
    return np.random.SeedSequence(entropy)


def _no_partner(rng):
    raise AssertionError("no partner is needed")


def _apply(steps, sample, *seed, partner=_no_partner):
    return Recipe(steps)(sample, _seed(*seed), partner)[0]


def painted(rng, objects, height, width):
    """An image in which the objects of class k (1, 2, 3) fill their boxes in channel k - 1, on black; those of class 3
    are difficult."""
    image = np.zeros((height, width, 3), np.uint8)
    boxes, labels = [], []
    for _ in range(objects):
        w, h = int(rng.integers(4, width // 2)), int(rng.integers(4, height // 2))
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        label = int(rng.integers(1, 4))
        image[y : y + h, x : x + w, label - 1] = 255
        boxes.append((x, y, x + w, y + h))
        labels.append(label)
    labels = np.array(labels, np.int64)
    return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), labels, labels == 3)


def _lit(sample, box, label):
    """Share of the whole pixels inside a box in which the channel of its class is lit."""
    x1, y1 = np.ceil(box[:2] - 1e-3).astype(int)
    x2, y2 = np.floor(box[2:] + 1e-3).astype(int)
    pixels = sample.image[y1:y2, x1:x2, label - 1]
    return (pixels > 60).mean() if pixels.size else 1.0


# ---- every recipe ----


@pytest.mark.parametrize("name", GEOMETRIC)
@given(seed=st.integers(0, 2**32 - 1), objects=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_boxes_stay_in_the_image_and_on_the_pixels_of_their_class(name, seed, objects):
    rng = np.random.default_rng(seed)
    sample = painted(rng, objects, int(rng.integers(20, 90)), int(rng.integers(20, 90)))
    before = sample.image.copy(), sample.boxes.copy()
    partners = [
        painted(rng, int(rng.integers(0, 5)), int(rng.integers(15, 90)), int(rng.integers(15, 90))) for _ in "abc"
    ]
    out = _apply(GEOMETRIC[name], sample, seed, partner=lambda generator: generator.choice(partners))
    height, width = out.size
    assert out.image.dtype == np.uint8 and out.boxes.dtype == np.float32 and out.boxes.shape == (len(out.labels), 4)
    assert (out.boxes >= 0).all() and (out.boxes <= [width, height, width, height]).all()
    assert (out.boxes[:, 2:] - out.boxes[:, :2] >= 0.98).all()
    # A pasted object may cover 0.3 of another one; interpolation blurs the outermost pixels of small ones.
    least = {"copy_paste_boxes": 0.5}.get(name, 0.75)
    for box, label, difficult in zip(out.boxes, out.labels, out.difficult, strict=True):
        assert difficult == (label == 3)
        assert _lit(out, box, label) >= least
    np.testing.assert_array_equal(sample.image, before[0])
    np.testing.assert_array_equal(sample.boxes, before[1])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_every_name_takes_images_with_and_without_objects(name, seed):
    recipe = build_augmentation(name)
    if recipe is None:
        assert name == "none"
        return
    rng = np.random.default_rng(seed)
    for objects in (0, 3):
        sample = painted(rng, objects, 40, 66)
        out, scale = recipe(sample, _seed(seed), lambda _: painted(rng, 0, 31, 24))
        assert out.image.dtype == np.uint8 and out.image.shape[2] == 3
        assert len(out.boxes) == len(out.labels) == len(out.difficult) <= objects
        assert out.boxes.dtype == np.float32 and out.labels.dtype == np.int64 and out.difficult.dtype == np.bool_
        assert (scale is not None) == (name == "multiscale")


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_result_depends_on_the_seed_and_not_on_what_came_before(name):
    rng = np.random.default_rng(3)
    noise = [Sample(rng.integers(0, 255, (30, 41, 3), np.uint8), *painted(rng, 2, 30, 41)[1:]) for _ in range(4)]

    def run(recipe, number):
        return recipe(noise[0], _seed(1, 0, number), lambda generator: generator.choice(noise[1:]))

    recipe = build_augmentation(name)
    first = [run(recipe, number) for number in range(6)]
    other = pickle.loads(pickle.dumps(build_augmentation(name)))  # as a spawned worker gets it
    again = [run(other, number) for number in reversed(range(6))][::-1]
    for (left, scale), (right, scale_again) in zip(first, again, strict=True):
        assert scale == scale_again
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len({(item.image.tobytes(), scale) for item, scale in first}) >= (2 if name == "flip" else 4)


def test_the_steps_of_a_recipe_are_drawn_independently(sample_of):
    """Equal seeds in all transforms would flip only images whose colours also change."""
    recipe = build_augmentation("photometric")
    counts = np.zeros((2, 2))
    for number in range(300):
        out, _ = recipe(sample_of([[3, 7, 41, 30]]), _seed(number), _no_partner)
        mirrored = out.boxes[0, 0] > 50
        plain = sample_of([]).image[:, ::-1] if mirrored else sample_of([]).image
        counts[int(mirrored), int(not np.array_equal(out.image, plain))] += 1
    share = counts[:, 1] / counts.sum(1)  # jittered, of the unflipped and of the flipped: both 0.8 +- 0.033
    np.testing.assert_allclose(share, 0.8, atol=0.12)
    np.testing.assert_allclose(counts.sum(1) / 300, 0.5, atol=0.12)


# ---- one image ----


def test_flip_is_width_minus_x(sample_of):
    boxes = np.array([[3.25, 7, 41.5, 30], [0, 0, 1, 1], [96, 59, 97, 60], [0, 0, 97, 60]], np.float32)
    flipped = np.array([[55.5, 7, 93.75, 30], [96, 0, 97, 1], [0, 59, 1, 60], [0, 0, 97, 60]], np.float32)
    outcomes = set()
    for number in range(20):
        out = build_augmentation("flip")(sample_of(boxes), _seed(number), _no_partner)[0]
        mirrored = bool(out.image[0, 0, 0] == 60)
        outcomes.add(mirrored)
        np.testing.assert_array_equal(out.boxes, flipped if mirrored else boxes)
        np.testing.assert_array_equal(out.image, sample_of([]).image[:, ::-1] if mirrored else sample_of([]).image)
        assert out.labels.tolist() == [1, 2, 3, 4] and out.difficult.tolist() == [False, True, False, True]
    assert outcomes == {True, False}


def test_flip_twice_is_the_identity_on_a_large_image(sample_of):
    image = np.zeros((20, 4001, 3), np.uint8)
    image[:, 0] = 255
    boxes = np.array([[0.1, 0.3, 3999.7, 19.9], [2000.3, 1, 2001.3, 2]], np.float32)
    twice = _apply([HorizontalFlip(), HorizontalFlip()], sample_of(boxes, image), 0)
    np.testing.assert_array_equal(twice.image, image)
    np.testing.assert_allclose(twice.boxes, boxes, atol=5e-4)  # float32 at 4000 pixels, over a flip and back


def test_colours_change_as_their_factors_say(sample_of):
    image = np.array([[[100, 40, 60], [200, 200, 200]]], np.uint8)
    fixed = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0), "p": 1}

    def colours(**changes):
        return _apply([ColorJitter(**fixed | changes)], sample_of([], image), 0).image[0].tolist()

    np.testing.assert_allclose(colours(), image[0], atol=2)  # HSV and back
    np.testing.assert_allclose(colours(brightness=(1.25, 1.25)), [[125, 50, 75], [250, 250, 250]], atol=2)
    # greys: 0.299 R + 0.587 G + 0.114 B = 60.2 and 200, on average 130
    np.testing.assert_allclose(colours(contrast=(0.5, 0.5)), [[115, 85, 95], [165, 165, 165]], atol=2)
    np.testing.assert_allclose(colours(saturation=(0.5, 0.5)), [[80, 50, 60], [200, 200, 200]], atol=2)
    np.testing.assert_allclose(colours(hue=(1 / 3, 1 / 3)), [[60, 100, 40], [200, 200, 200]], atol=3)  # red to green


def test_cropped_boxes_lie_on_the_pixels_of_their_objects(sample_of):
    """Objects are painted; after crop and flip each box must be what a search for its colour finds."""
    boxes = np.array([[5, 4, 30, 20], [50, 10, 90, 55], [10, 35, 14, 58], [96, 0, 97, 1]], np.float32)
    image = np.zeros((60, 97, 3), np.uint8)
    for index, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        image[y1:y2, x1:x2] = 50 * (index + 1)
    kept_counts = []
    for number in range(120):
        out = _apply(GEOMETRIC["ssd_crop"], sample_of(boxes, image), number)
        kept_counts.append(len(out.labels))
        for index in range(len(boxes)):
            rows, columns = np.nonzero(out.image[:, :, 0] == 50 * (index + 1))
            full = (boxes[index, 2] - boxes[index, 0]) * (boxes[index, 3] - boxes[index, 1])
            assert (index + 1 in out.labels) == (len(rows) >= 0.25 * full and len(rows) > 0)
            if index + 1 in out.labels:
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_array_equal(out.boxes[out.labels.tolist().index(index + 1)], expected)
    assert min(kept_counts) < 4 and max(kept_counts) == 4


def test_rule_of_what_remains():
    boxes = np.array(
        [
            [8, 0, 12, 10],  # half of it inside
            [8, 0, 16, 10],  # a quarter
            [8, 0, 16.1, 10],  # less
            [9.5, 0, 10, 4],  # half a pixel wide, not cut
            [9.5, 0, 10.5, 4],  # cut to half a pixel
            [-1, -1, 11, 11],  # all around
        ],
        np.float32,
    )
    found, which = place(boxes, (0, 0, 10, 10), (20, 30, 40, 60))
    assert which.tolist() == [0, 1, 3, 4, 5]  # enlarged, even the cut one has a pixel
    np.testing.assert_allclose(found[0], [36, 30, 40, 60])
    np.testing.assert_allclose(found[4], [20, 30, 40, 60])
    assert place(boxes, (0, 0, 10, 10), (0, 0, 10, 10))[1].tolist() == [0, 1, 3, 5]
    assert place(boxes, (0, 0, 10, 10), (0, 0, 4, 4))[1].tolist() == [5]  # of the others 0.2 to 0.8 pixels are left


def test_objects_smaller_than_a_pixel_survive_a_flip(sample_of):
    assert len(_apply([HorizontalFlip()], sample_of([[10.0, 10.0, 10.4, 10.3]]), 0).boxes) == 1


def test_crops_are_at_most_twice_as_long_as_wide():
    """Sides of 0.3 to 1 of a square image would give ratios from 0.3 to 3.3."""
    sample = Sample(
        np.zeros((200, 200, 3), np.uint8), np.array([[0, 0, 200, 200]], np.float32), np.array([1]), np.array([False])
    )
    shapes = [_apply([MinIoUCrop()], sample, seed).image.shape for seed in range(300)]
    ratios = [height / width for height, width, _ in shapes]
    assert 0.5 <= min(ratios) < 0.6 and 1.8 < max(ratios) <= 2


def test_scales_are_drawn_evenly(sample_of):
    recipe = build_augmentation("multiscale")
    drawn = [recipe(sample_of([]), _seed(number), _no_partner)[1] for number in range(1100)]
    values, counts = np.unique(np.round(np.multiply(drawn, 800)), return_counts=True)
    assert values.tolist() == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert counts.min() > 60
