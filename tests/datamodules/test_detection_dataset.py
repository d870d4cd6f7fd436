"""Images with boxes as a dataset: their sizes, and what they are mixed with."""

from random import Random

import numpy as np
import pytest
from PIL import Image

from datamodules.bad_data import NextImageInstead
from datamodules.dataset_format import ImageRecord, ObjectRecord
from datamodules.detection_dataset import DetectionDataset
from datamodules.image_cache import make_reader
from detector.errors import InputError


def record(path, size=(0, 0), upright=False) -> ImageRecord:
    return ImageRecord(path, path.name, [ObjectRecord(0, "cat", (1, 2, 5, 9))], upright, size)


@pytest.fixture
def images(tmp_path):
    """Three images of 30 x 20 pixels (width x height), of one grey value each; the third is to be turned upright."""
    for value in (10, 20, 30):
        exif = Image.Exif()
        exif[274] = 6 if value == 30 else 1  # turn by 90 degrees
        Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(tmp_path / f"{value}.png", exif=exif)
    return [tmp_path / f"{value}.png" for value in (10, 20, 30)]


def test_sizes_are_height_and_width_of_what_is_read(images):
    records = [record(images[0]), record(images[1], size=(30, 20)), record(images[2], upright=True)]
    dataset = DetectionDataset(records, ["cat"])
    assert dataset.sizes.tolist() == [[20, 30], [20, 30], [30, 20]]
    assert [tuple(dataset[index][0].shape[1:]) for index in range(3)] == [(20, 30), (20, 30), (30, 20)]


def test_an_image_is_mixed_with_each_other_one_and_never_with_itself(images):
    dataset = DetectionDataset([record(path) for path in images], ["cat"])
    for index, others in enumerate(({20, 30}, {10, 30}, {10, 20})):
        drawn = [int(dataset._partner(index, Random(seed)).image.max()) for seed in range(60)]
        assert set(drawn) == others
        assert 15 < sum(value == min(others) for value in drawn) < 45


def test_a_lone_image_is_mixed_with_itself(images):
    assert int(DetectionDataset([record(images[0])], ["cat"])._partner(0, Random(0)).image.max()) == 10


@pytest.mark.parametrize("kind", ["none", "memory", "disk"])
def test_an_image_replaced_by_one_of_another_size_is_not_trained_on(images, tmp_path, kind):
    dataset = DetectionDataset([record(path) for path in images], ["cat"])
    dataset.read = make_reader(kind, dataset.files, dataset.sizes, str(tmp_path / "cache"), 1)
    assert dataset[1][0].shape == (3, 20, 30)
    for size, replaced in (((20, 30), False), ((30, 20), True)):  # height, width
        Image.fromarray(np.full((*size, 3), 77, np.uint8)).save(images[0])
        if replaced:
            with pytest.raises(InputError, match=r"10\.png: has 20 x 30 pixels now, and had 30 x 20"):
                dataset[0]
            assert NextImageInstead(dataset)[0][1]["file_name"] == "20.png"
        elif kind != "memory":  # which keeps the first that it has read
            assert int(dataset[0][0].max()) == 77
