"""Augmentations as names and lists of class paths: of albumentations, of torchvision, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from datamodules.augmentation.recipes import build_augmentation
from datamodules.augmentation.torchvision_step import _WHOLE
from detector.errors import InputError
from tests.datamodules.augmentation.test_recipes import _no_partner, _seed, painted

# ---- names and lists ----


def test_names():
    assert build_augmentation("none") is None and build_augmentation([]) is None
    with pytest.raises(InputError, match=r"'cutmix'.*none, flip, photometric, ssd_crop, multi.*class_path"):
        build_augmentation("cutmix")


def test_a_list_mixes_both_kinds():
    recipe = build_augmentation(
        [
            {"class_path": "datamodules.augmentation.mixing.Mosaic", "init_args": {"p": 1}},
            {
                "class_path": "albumentations.OneOf",
                "init_args": {
                    "transforms": [{"class_path": "albumentations.VerticalFlip", "init_args": {"p": 1}}],
                    "p": 1,
                },
            },
            {"class_path": "albumentations.ToGray", "init_args": {"p": 1}},
            {"class_path": "datamodules.augmentation.transforms.MultiScale", "init_args": {"factors": [0.5]}},
        ]
    )
    rng = np.random.default_rng(1)
    out, scale = recipe(painted(rng, 3, 40, 60), _seed(1), lambda _: painted(rng, 2, 40, 60))
    assert out.size == (60, 90) and scale == 0.5
    assert (out.image[..., 0] == out.image[..., 1]).all() and len(recipe.steps) == 2


def test_albumentations_drops_objects_by_the_same_rule(sample_of):
    crop = {
        "class_path": "albumentations.Crop",
        "init_args": {"x_min": 0, "y_min": 0, "x_max": 10, "y_max": 10, "p": 1},
    }
    recipe = build_augmentation([crop])
    boxes = [[8, 0, 12, 10], [8, 0, 15.9, 10], [8, 0, 16.1, 10], [20, 20, 30, 30]]
    out, _ = recipe(sample_of(boxes), _seed(0), _no_partner)
    assert out.labels.tolist() == [1, 2] and out.difficult.tolist() == [False, True]
    np.testing.assert_allclose(out.boxes, [[8, 0, 10, 10]] * 2, atol=1e-4)
    none_left, _ = recipe(sample_of([[20, 20, 30, 30]]), _seed(0), _no_partner)
    assert none_left.boxes.shape == (0, 4) and none_left.boxes.dtype == np.float32


def test_albumentations_may_shrink_objects(sample_of):
    """Shrinking is no cut: what is a tenth of its area is kept."""
    shrink = {"class_path": "albumentations.Affine", "init_args": {"scale": [0.3, 0.3], "p": 1.0}}
    out, _ = build_augmentation([shrink])(sample_of([[10, 10, 50, 50]]), _seed(0), _no_partner)
    np.testing.assert_allclose(out.boxes[0, 2:] - out.boxes[0, :2], [12, 12], atol=0.2)


def _of_torchvision(name, **arguments):
    return {"class_path": f"torchvision.transforms.v2.{name}", "init_args": arguments}


@pytest.mark.skipif(not _WHOLE, reason="torchvision cuts boxes before they can be compared")
def test_torchvision_drops_objects_by_the_same_rule(sample_of):
    """Of an image of 60 x 40 the 20 x 20 pixels in the middle are kept: columns 20 to 40, rows 10 to 30."""
    recipe = build_augmentation([_of_torchvision("CenterCrop", size=[20, 20])])
    boxes = [[38, 10, 42, 30], [38, 10, 45.9, 30], [38, 10, 46.1, 30], [0, 0, 10, 10]]
    out, _ = recipe(sample_of(boxes, np.zeros((40, 60, 3), np.uint8)), _seed(0), _no_partner)
    assert out.labels.tolist() == [1, 2] and out.difficult.tolist() == [False, True]
    np.testing.assert_allclose(out.boxes, [[18, 0, 20, 20]] * 2, atol=1e-4)
    assert out.size == (20, 20) and out.image.flags.c_contiguous
    none_left, _ = recipe(sample_of([[0, 0, 10, 10]]), _seed(0), _no_partner)
    assert none_left.boxes.shape == (0, 4) and none_left.boxes.dtype == np.float32


def test_torchvision_may_drop_objects_by_itself(sample_of):
    """Labels and difficult flags stay with the boxes that are left."""
    recipe = build_augmentation([_of_torchvision("SanitizeBoundingBoxes", min_area=50)])
    out, _ = recipe(sample_of([[0, 0, 5, 5], [0, 0, 10, 10], [0, 0, 30, 10]]), _seed(0), _no_partner)
    assert (out.labels.tolist(), out.difficult.tolist()) == ([2, 3], [True, False])
    assert out.boxes.tolist() == [[0, 0, 10, 10], [0, 0, 30, 10]]


def test_torchvision_draws_from_the_seed_and_leaves_other_draws_alone(sample_of):
    recipe = build_augmentation([_of_torchvision("GaussianNoise", sigma=0.2), _of_torchvision("RandomVerticalFlip")])
    sample = sample_of([[10, 0, 20, 10]])
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    drawn = [recipe(sample, _seed(seed), _no_partner)[0] for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(3), first)
    assert (drawn[0].image == drawn[1].image).all() and (drawn[0].image != drawn[2].image).any()
    tops = {recipe(sample, _seed(seed), _no_partner)[0].boxes[0, 1].item() for seed in range(20)}
    assert tops == {0.0, 50.0}  # mirrored, or not


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (_of_torchvision("Normalize", mean=[0.5], std=[1.0]), "Normalize: .*float tensor"),
        (_of_torchvision("Grayscale"), r"Grayscale: an image came out as torch.uint8 \(1, 60, 97\)"),
        (_of_torchvision("ToPureTensor"), "ToPureTensor: boxes came out as Tensor of 1"),
        (_of_torchvision("RandomCrop", size=100), "RandomCrop: .*width 97, height 60"),
        (_of_torchvision("AutoAugment"), "AutoAugment: .*BoundingBoxes are not supported"),
    ],
)
def test_what_torchvision_does_to_no_image_with_boxes_is_named(sample_of, item, words):
    recipe = build_augmentation([item])
    with pytest.raises(InputError, match=rf"--data\.augmentation: {words}"):
        recipe(sample_of([[0, 0, 30, 30]]), _seed(0), _no_partner)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"class_path": "albumentations.HorizontalFlop"}, "has no attribute 'HorizontalFlop'"),
        ({"class_path": "HorizontalFlip"}, "HorizontalFlip: is no class path, such as"),
        ({"class_path": "collections.OrderedDict"}, r"no transform of albumentations or torchvision\.transforms\.v2"),
        ({"class_path": "torchvision.transforms.RandomRotation", "init_args": {"degrees": 9}}, "no transform of"),
        (_of_torchvision("RandomRotation"), "missing .* 'degrees'"),
        (_of_torchvision("RandomRotation", degrees=9, q=1), "unexpected keyword argument 'q'"),
        (
            {
                "class_path": "albumentations.OneOf",
                "init_args": {"transforms": [_of_torchvision("RandomVerticalFlip")]},
            },
            "OneOf: 'RandomVerticalFlip' object has no",
        ),
        ({"class_path": "albumentations.HorizontalFlip", "init_args": {"q": 1}}, "'q'.*not valid"),
        ({"class_path": "albumentations.Blur", "init_args": {"blur_limit": "x"}}, "albumentations.Blur: "),
        ({"class_path": "albumentations.OverlayElements"}, "does not take boxes"),
        ({"class_path": "datamodules.augmentation.mixing.MixUp", "init_args": {"p": 2}}, "MixUp: p is 2"),
        ({"class_path": "datamodules.augmentation.mixing.MixUp", "init_args": {"size": 2}}, "size"),
        ({"class_path": "datamodules.augmentation.transforms.MultiScale", "init_args": {"factors": []}}, "factors is"),
        ({"name": "flip"}, "is not of the form"),
        ("albumentations.HorizontalFlip", "is not of the form"),
        ({"class_path": "albumentations.HorizontalFlip", "init_args": [1]}, "init_args is"),
    ],
)
def test_bad_lists_are_refused_at_once(item, words):
    with pytest.raises(InputError, match=r"--data\.augmentation.*" + words) as caught:
        build_augmentation([item])
    assert "\n" not in str(caught.value)


def test_a_transform_that_gives_no_image_back_is_named(sample_of):
    recipe = build_augmentation([{"class_path": "albumentations.Normalize"}])
    with pytest.raises(InputError, match=r"Normalize: an image came out as float32"):
        recipe(sample_of([]), _seed(0), _no_partner)


def test_albumentations_is_imported_only_for_lists_and_asks_nobody():
    code = (
        "import os, sys; from datamodules.augmentation.recipes import build_augmentation as build; build('ssd_crop');"
        "assert 'albumentations' not in sys.modules and os.environ['NO_ALBUMENTATIONS_UPDATE'];"
        "build([{'class_path': 'albumentations.Blur'}]); assert 'albumentations' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
