import os
import pickle

import albumentations as A
import numpy as np
import pytest

from datamodules.augmentations import AUGMENTATIONS, MinIoUCrop, augment, build_augmentation
from detector.errors import InputError

HEIGHT, WIDTH = 60, 97


def _seed(*entropy):
    return np.random.SeedSequence(entropy)


def _image():
    image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    image[:, : WIDTH // 3] = 180
    return image


def _crop_and_flip():
    params = A.BboxParams(format="pascal_voc", min_area=1e-2, clip=True)
    return A.Compose([MinIoUCrop(), A.HorizontalFlip(p=0.5)], bbox_params=params)


def test_flip_is_width_minus_x():
    boxes = np.array([[3.25, 7, 41.5, 30], [0, 0, 1, 1], [96, 59, 97, 60], [0, 0, 97, 60]], np.float32)
    flipped = np.array([[55.5, 7, 93.75, 30], [96, 0, 97, 1], [0, 59, 1, 60], [0, 0, 97, 60]], np.float32)
    compose = build_augmentation("flip")
    outcomes = set()
    for number in range(20):
        image, out, which = augment(compose, _image(), boxes, _seed(number))
        mirrored = bool(image[0, 0, 0] == 60)
        outcomes.add(mirrored)
        np.testing.assert_allclose(out, flipped if mirrored else boxes, atol=1e-4)
        np.testing.assert_array_equal(image, _image()[:, ::-1] if mirrored else _image())
        assert which.tolist() == [0, 1, 2, 3]
    assert outcomes == {True, False}


def test_flip_twice_is_the_identity_on_a_large_image():
    image = np.zeros((20, 4001, 3), np.uint8)
    image[:, 0] = 255
    boxes = np.array([[0.1, 0.3, 3999.7, 19.9], [2000.3, 1, 2001.3, 2]], np.float32)
    compose = A.Compose([A.HorizontalFlip(p=1.0)], bbox_params=A.BboxParams(format="pascal_voc", clip=True))
    once = augment(compose, image, boxes, _seed(0))
    twice = augment(compose, once[0], once[1], _seed(0))
    np.testing.assert_allclose(twice[1], boxes, atol=2e-3)  # float32 at 4000 pixels, over a flip and back


def test_result_depends_on_the_seed_and_not_on_what_came_before():
    compose = build_augmentation("ssd_crop")
    boxes = np.array([[3, 7, 41, 30]], np.float32)
    first = [augment(compose, _image(), boxes, _seed(1, 0, n)) for n in range(6)]
    other = pickle.loads(pickle.dumps(build_augmentation("ssd_crop")))  # as a spawned worker gets it
    again = [augment(other, _image(), boxes, _seed(1, 0, n)) for n in reversed(range(6))][::-1]
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left[0], right[0])
        np.testing.assert_array_equal(left[1], right[1])
    assert len({image.tobytes() for image, _, _ in first}) == 6


def test_the_steps_of_a_recipe_are_drawn_independently():
    """Equal seeds in all transforms would flip only images whose colours also change."""
    compose = build_augmentation("photometric")
    boxes = np.array([[3, 7, 41, 30]], np.float32)
    counts = np.zeros((2, 2))
    for number in range(300):
        image, out, _ = augment(compose, _image(), boxes, _seed(number))
        mirrored = out[0, 0] > 50
        plain = _image()[:, ::-1] if mirrored else _image()
        counts[int(mirrored), int(not np.array_equal(image, plain))] += 1
    share = counts[:, 1] / counts.sum(1)  # jittered, of the unflipped and of the flipped: both 0.8 +- 0.033
    np.testing.assert_allclose(share, 0.8, atol=0.12)
    np.testing.assert_allclose(counts.sum(1) / 300, 0.5, atol=0.12)


def test_photometric_changes_no_box():
    compose = build_augmentation("photometric")
    boxes = np.array([[3.5, 7, 41, 30]], np.float32)
    for number in range(10):
        image, out, _ = augment(compose, _image(), boxes, _seed(number))
        assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
        assert np.allclose(out, boxes, atol=1e-4) or np.allclose(out, [[56, 7, 93.5, 30]], atol=1e-4)


def test_cropped_boxes_lie_on_the_pixels_of_their_objects():
    """Objects are painted; after crop and flip each box must be what a search for its colour finds."""
    boxes = np.array([[5, 4, 30, 20], [50, 10, 90, 55], [10, 35, 14, 58], [96, 0, 97, 1]], np.float32)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for index, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        image[y1:y2, x1:x2] = 50 * (index + 1)
    compose, kept_counts = _crop_and_flip(), []
    for number in range(120):
        out_image, out, which = augment(compose, image, boxes, _seed(number))
        kept_counts.append(len(which))
        for index in range(len(boxes)):
            rows, columns = np.nonzero(out_image[:, :, 0] == 50 * (index + 1))
            full = (boxes[index, 2] - boxes[index, 0]) * (boxes[index, 3] - boxes[index, 1])
            assert (index in which) == (len(rows) >= 0.25 * full and len(rows) > 0)
            if index in which:
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_allclose(out[list(which).index(index)], expected, atol=1e-3)
    assert min(kept_counts) < 4 and max(kept_counts) == 4


def test_a_crop_may_leave_no_object():
    compose = A.Compose(
        [A.Crop(60, 30, 97, 60)], bbox_params=A.BboxParams(format="pascal_voc", min_area=1e-2, clip=True)
    )
    _, out, which = augment(compose, _image(), np.array([[0, 0, 62, 32]], np.float32), _seed(0))
    assert out.shape == (0, 4) and which.shape == (0,)


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_images_without_objects_pass(name):
    for number in range(5):
        image, out, which = augment(build_augmentation(name), _image(), np.zeros((0, 4), np.float32), _seed(number))
        assert image.ndim == 3 and out.shape == (0, 4) and out.dtype == np.float32 and which.shape == (0,)


def test_objects_smaller_than_a_pixel_survive_a_flip():
    boxes = np.array([[10.0, 10.0, 10.4, 10.3]], np.float32)
    assert all(len(augment(build_augmentation("flip"), _image(), boxes, _seed(n))[2]) == 1 for n in range(8))


def test_names():
    assert build_augmentation("none") is None
    with pytest.raises(InputError, match=r"'mosaic'.*none, flip, photometric, ssd_crop"):
        build_augmentation("mosaic")


def test_no_version_check_on_import():
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"]
