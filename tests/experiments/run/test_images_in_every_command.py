"""What an image may be called, how deep and how large it is: the same for trainings, the doctor and pictures."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAME = os.fsdecode(b"caf\xe9")


@pytest.fixture
def data(mini_voc, tmp_path) -> Path:
    """A copy of the dataset, without lists of splits, in which one image has a name that is not UTF-8."""
    root = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    first = sorted((root / "JPEGImages").iterdir())[0]
    first.rename(first.with_stem(NAME))
    (root / "Annotations" / f"{first.stem}.xml").rename(root / "Annotations" / f"{NAME}.xml")
    shutil.rmtree(root / "ImageSets")
    return root


def test_a_training_on_names_that_are_no_utf_8(frcnn, tiny_config, data, tmp_path):
    options = ("--data.train_splits", "[]", "--data.val_splits", "[]", "--data.test_splits", "[]")
    made = ("--data.val_fraction", 0.9, "--data.split_seed", 1)
    result = frcnn("fit", "--config", tiny_config, "--data.root", data, *options, *made, cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert os.fsencode(NAME) in (run / "splits" / "val.txt").read_bytes()
    assert f"{NAME}.jpg" in {entry["file_name"] for entry in json.loads((run / "predictions.json").read_text())}
    events = b"".join(path.read_bytes() for path in run.glob("events.*"))
    assert rb"val_images/caf\xe9.jpg" in events


def test_the_doctor_and_the_sheet_show_names_that_are_no_utf_8(frcnn, tiny_config, data, tmp_path):
    (image,) = (path for path in (data / "JPEGImages").iterdir() if path.stem == NAME)
    whole = image.read_bytes()
    image.write_bytes(whole[:-700])
    result = frcnn("doctor", data, cwd=tmp_path)
    assert result.code == 1
    result.out.encode()
    assert r"truncated_image:" in result.out and r"caf\xe9.jpg" in result.out
    image.write_bytes(whole)
    options = ("--data.train_splits", "[]", "--data.val_splits", "[]", "--data.test_splits", "[]")
    sheet = ("--output", "sheets", "--images", 19, "--epochs", 1, "--data.val_fraction", 0.05)
    result = frcnn("show-data", "--config", tiny_config, "--data.root", data, *options, *sheet, cwd=tmp_path)
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["flip.png"]


def test_the_doctor_takes_bit_depth_and_limit(frcnn, data, tmp_path):
    for path in sorted((data / "JPEGImages").iterdir()):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L")).astype(np.uint16)
        Image.fromarray(grey * 16).save(path.with_suffix(".png"))
        path.unlink()
    found = json.loads(frcnn("doctor", data, "--format", "json", cwd=tmp_path).out)
    assert found["kinds"]["dark_images"] == 1
    twelve = json.loads(frcnn("doctor", data, "--data.bit_depth", 12, "--format", "json", cwd=tmp_path).out)
    assert "dark_images" not in twelve["kinds"]
    few = json.loads(frcnn("doctor", data, "--data.max_pixels", 10, "--format", "json", cwd=tmp_path).out)
    assert few["kinds"]["unreadable_image"] == 20
    for option, value in (("--data.bit_depth", 20), ("--data.max_pixels", 0)):
        refused = frcnn("doctor", data, option, value, cwd=tmp_path)
        assert refused.code == 2 and option.removeprefix("--") in refused.err


def test_every_command_has_the_limit(frcnn, tiny_config, tmp_path):
    for command in (("fit",), ("show-data", "--output", "sheets")):
        result = frcnn(*command, "--config", tiny_config, "--data.max_pixels", 100, cwd=tmp_path)
        assert result.code == 2
        assert "data.max_pixels" in result.err and "pixels, " in result.err
    assert list(tmp_path.iterdir()) == []
