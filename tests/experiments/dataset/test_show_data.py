"""`frcnn show-data` draws what training would be given."""

import numpy as np
import pytest
from PIL import Image

from datamodules.augmentation.recipes import AUGMENTATIONS
from datamodules.dataset_format import ImageRecord, ObjectRecord
from datamodules.detection_dataset import DetectionDataset
from detector.training import lightning_module
from detector.use.drawing import class_color
from experiments.dataset.show_data import CELL, GAP, TITLE, contact_sheet


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_sheet_of_each_recipe(frcnn, tiny_config, tmp_path, augmentation, monkeypatch):
    monkeypatch.setattr(lightning_module, "FasterRCNN", None)  # no model is built
    options = ("--data.augmentation", augmentation, "--images", 3, "--epochs", 2)
    result = frcnn("show-data", "--config", tiny_config, "--output", tmp_path / "sheets", *options, cwd=tmp_path)
    assert result.code == 0, result.err
    path = tmp_path / "sheets" / f"{augmentation}.png"
    with Image.open(path) as sheet:
        assert sheet.width == 3 * (CELL + GAP) + GAP
    assert str(path) in result.out and "3 images in 2 epochs" in result.out
    assert [item.name for item in tmp_path.iterdir()] == ["sheets"]  # no run folder


def test_a_list_of_class_paths(frcnn, tiny_config, tmp_path):
    flips = "[{class_path: albumentations.VerticalFlip, init_args: {p: 1}}]"
    result = frcnn(
        *("show-data", "--config", tiny_config, "--output", tmp_path, "--data.augmentation", flips),
        *("--images", 1, "--epochs", 1),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    pixels = np.array(Image.open(tmp_path / "custom.png")).astype(int)
    height = pixels.shape[0] - 2 * GAP - TITLE
    top = GAP + TITLE
    stored = pixels[top : top + height, GAP : GAP + CELL]
    flipped = pixels[top : top + height, 2 * GAP + CELL : 2 * GAP + 2 * CELL]
    assert np.median(abs(stored - flipped[::-1])) < 3  # all but captions
    assert np.median(abs(stored - flipped)) > 3


def test_a_sheet_that_no_memory_holds_is_refused(frcnn, tiny_config, tmp_path):
    options = ("--output", tmp_path, "--images", 10, "--epochs", 200)
    result = frcnn("show-data", "--config", tiny_config, *options, cwd=tmp_path)
    assert result.code == 2 and "2010 pictures" in result.err


def test_a_strip_of_pixels_fits_into_its_place(tmp_path):
    for number, size in enumerate([(10_000, 1), (1, 10_000)]):
        Image.new("RGB", size, (90, 90, 90)).save(tmp_path / f"{number}.png")
    item = ObjectRecord(0, "one", (0, 0, 1, 1))
    records = [ImageRecord(tmp_path / f"{n}.png", f"{n}.png", [item]) for n in range(2)]
    sheet, stored, _ = contact_sheet(DetectionDataset(records, ["one"]), [0, 1], 1)
    assert stored == 2
    assert sheet.size == (2 * (CELL + GAP) + GAP, 3 * GAP + 2 * TITLE + 1 + CELL)


def test_what_is_drawn_where(tmp_path):
    """A grey image with one plain and one difficult object: solid and dashed outlines in the colours of the classes."""
    Image.new("RGB", (160, 80), (90, 90, 90)).save(tmp_path / "a.png")
    objects = [ObjectRecord(0, "one", (10, 40, 40, 70)), ObjectRecord(1, "two", (100, 40, 140, 70), difficult=True)]
    record = ImageRecord(tmp_path / "a.png", "a.png", objects)
    dataset = DetectionDataset([record], ["one", "two"])
    sheet, stored, drawn = contact_sheet(dataset, [0], 2)
    assert (stored, drawn) == (2, 4)
    assert sheet.size == (3 * (CELL + GAP) + GAP, 2 * GAP + TITLE + 160)
    pixels = np.array(sheet)[GAP + TITLE :, GAP : GAP + CELL]  # twice as large as the image
    row = pixels[139]  # the boxes' lower edges, inside them
    solid = (row[20:80] == class_color("one")).all(1)
    dashed = (row[200:280] == class_color("two")).all(1)
    assert solid.all()
    assert 0.3 < dashed.mean() < 0.7
    assert not (pixels[139, 85:195] == class_color("one")).all(1).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "output"),
        (("--output", "x", "--images", "0"), "--images 0"),
        (("--output", "x", "--data.augmentation", "foo"), "'foo' is unknown"),
        (("--output", "x", "--data.augmentation", "[{class_path: foo.Bar}]"), "foo.Bar: No module named 'foo'"),
        (("--output", "{file}/x"), "--output"),
        (("--output", "x.PNG"), "--output x.PNG: give a folder"),
    ],
)
def test_bad_options(frcnn, tiny_config, tmp_path, options, words):
    (tmp_path / "file").write_text("")
    options = [option.replace("{file}", str(tmp_path / "file")) for option in options]
    result = frcnn("show-data", "--config", tiny_config, *options, cwd=tmp_path)
    assert result.code == 2 and words in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
