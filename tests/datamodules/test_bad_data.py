import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.bad_data import SHOWN, NextImageInstead, ends_properly
from datamodules.voc.datamodule import VOCDataModule
from detector.errors import InputError


@pytest.fixture
def copied(mini_voc, tmp_path):
    return shutil.copytree(mini_voc, tmp_path / "copied")


def _module(root, **changes) -> VOCDataModule:
    arguments = {"root": str(root), "train_splits": ["train"], "val_splits": ["val"], "num_workers": 0}
    return VOCDataModule(**arguments | {"augmentation": "none"} | changes)


def _stems(root, split):
    return (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def _damage_inside(path):
    """Break the Huffman tables: the header and the end mark are as they were."""
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xc4")
    data[start + 5 : start + 21] = b"\xff" * 16
    path.write_bytes(bytes(data))
    with Image.open(path) as image:
        assert image.size > (1, 1)
    assert ends_properly(path)


# ---- before the first step ----


def test_a_long_list_is_cut_and_the_doctor_has_all_of_it(copied, frcnn):
    path = copied / "Annotations" / f"{_stems(copied, 'train')[3]}.xml"
    bad = "<object><name>ring</name><bndbox><xmin>9</xmin></bndbox></object>"
    path.write_text(path.read_text().replace("</annotation>", bad * (SHOWN + 5) + "</annotation>"))
    with pytest.raises(InputError) as caught:
        _module(copied).setup("fit")
    *listed, rest, advice = caught.value.details
    assert len(listed) == SHOWN and all(line.startswith(f"incomplete_object: {path}") for line in listed)
    assert rest.startswith("... and 5 more; frcnn doctor --format json lists all") and "--data.on_error skip" in advice
    all_of_it = json.loads(frcnn("doctor", copied, "--format", "json", cwd=copied).out)["problems"]
    problems = [item for item in all_of_it if item["kind"] == "incomplete_object"]
    assert len(problems) == SHOWN + 5 and {item["file"] for item in problems} == {str(path)}
    first = problems[0]["object"]
    assert [item["object"] for item in problems] == list(range(first, first + SHOWN + 5))


def test_one_problem_is_one_line(copied):
    (copied / "JPEGImages" / f"{_stems(copied, 'val')[1]}.jpg").unlink()
    with pytest.raises(InputError) as caught:
        _module(copied).setup("fit")
    assert caught.value.details == () and "more files" not in str(caught.value)


@pytest.mark.parametrize("cut", [2, 3, 100, 600])
def test_cut_images_are_found_before_the_first_step(copied, cut):
    path = copied / "JPEGImages" / f"{_stems(copied, 'train')[2]}.jpg"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match=rf"{path.name}: cannot be decoded"):
        _module(copied).setup("fit")


@pytest.mark.parametrize(
    ("suffix", "after", "whole"),
    [("jpg", b"\0\0\n", True), ("png", b"", True), ("bmp", b"", False), ("jpg", b"x", False)],
)
def test_ends_properly(tmp_path, suffix, after, whole):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(buffer.getvalue() + after)
    assert ends_properly(path) is whole
    path.write_bytes(buffer.getvalue()[:-20])
    assert not ends_properly(path)


def test_other_formats_are_decoded_instead(copied):
    """BMP has no end mark: a whole one is no problem, a cut one is."""
    stem = _stems(copied, "train")[0]
    old, new = (copied / "JPEGImages" / f"{stem}.{suffix}" for suffix in ("jpg", "bmp"))
    Image.open(old).save(new)
    old.unlink()
    _module(copied).setup("fit")
    new.write_bytes(new.read_bytes()[:-500])
    with pytest.raises(InputError, match=new.name):
        _module(copied).setup("fit")


# ---- skip ----


def test_skip_leaves_out_objects_and_images_and_says_so(broken_dataset, tmp_path, capsys):
    root = broken_dataset.root
    names = {"class_names": broken_dataset.class_names}
    data = _module(root, on_error="skip", **names)
    data.report_folder = tmp_path / "new" / "run"
    data.setup("fit")
    assert {name.removesuffix(".jpg") for name in data.train_dataset.file_names} == broken_dataset.usable
    assert data.val_dataset.file_names == [f"{stem}.jpg" for stem in _stems(root, "val")]
    listed = json.loads((data.report_folder / "data_problems.json").read_text())
    assert {(item["object"], item["kind"]) for item in listed} == {item[1:] for item in broken_dataset.stops}
    assert capsys.readouterr().err.count("--data.on_error skip") == 1
    data.setup("fit")  # as Lightning does after the command line has
    assert capsys.readouterr().err == ""
    crowded = next(file for file, _, kind in broken_dataset.stops if kind == "negative_box")
    index = data.train_dataset.file_names.index(f"{crowded.split('/')[-1].removesuffix('.xml')}.jpg")
    added = 8 - 5  # the partly outside, one-pixel and duplicate ones stay
    objects = (root / crowded).read_text().count("<object>")
    assert len(data.train_dataset.target(index)["labels"]) == objects - 8 + added


def test_skip_takes_shared_images_from_the_earlier_part(mini_voc, capsys):
    shared = {"train_splits": ["train"], "val_splits": ["odd"], "test_splits": ["odd"], "on_error": "skip"}
    with pytest.raises(InputError, match=r"leave no image of the val splits"):
        _module(mini_voc, **shared).setup("fit")
    capsys.readouterr()
    data = _module(mini_voc, **shared | {"test_splits": None})
    data.setup("fit")
    assert len(data.train_dataset) == 5 and len(data.val_dataset) == 7
    assert "leaves out 7 images and 0 objects (leak_by_name 7)" in capsys.readouterr().err
    alone = _module(mini_voc, **shared | {"test_splits": ["train"], "val_splits": ["odd", "val"]})
    alone.setup("validate")  # on the same images as in a training
    assert alone.val_dataset.file_names == [f"{stem}.jpg" for stem in _stems(mini_voc, "val")]


def test_classes_are_found_in_files_with_a_bad_object(copied):
    path = copied / "Annotations" / f"{_stems(copied, 'train')[3]}.xml"
    good = "<object><name>{}</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox></object>"
    more = good.format("moon", 9) + good.format("sun", 1)
    path.write_text(path.read_text().replace("</annotation>", more + "</annotation>"))
    data = _module(copied, on_error="skip")
    assert "moon" in data.class_names and "sun" not in data.class_names
    with pytest.raises(InputError, match="xmax 1 below xmin 3"):
        _module(copied).setup("fit")


# ---- what only decoding shows ----


def test_the_next_image_takes_the_place_of_an_undecodable_one(copied, capsys):
    stems = _stems(copied, "train")
    for number in (4, 5, 11):
        _damage_inside(copied / "JPEGImages" / f"{stems[number]}.jpg")
    with pytest.raises(InputError, match=rf"{stems[4]}.jpg: cannot be decoded"):
        data = _module(copied)
        data.setup("fit")
        list(data.train_dataloader())
    data = _module(copied, on_error="skip")
    data.setup("fit")
    dataset = NextImageInstead(data.train_dataset)
    capsys.readouterr()
    assert len(dataset) == 12 and dataset.file_names == data.train_dataset.file_names
    for asked, given in ((3, 3), (4, 6), (5, 6), (6, 6), (11, 0)):
        image, target = dataset[1, asked]
        assert target["file_name"] == f"{stems[given]}.jpg" and target["image_id"].item() == given
        assert torch.equal(image, data.train_dataset[1, given][0])
    dataset[2, 4]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all("the next image takes its place" in line for line in told)
    seen = sorted(target["image_id"].item() for _, targets in data.train_dataloader() for target in targets)
    assert seen == [0, 0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10]


def test_not_one_decodable_image(copied):
    for stem in _stems(copied, "val"):
        _damage_inside(copied / "JPEGImages" / f"{stem}.jpg")
    data = _module(copied, on_error="skip")
    data.setup("validate")
    with pytest.raises(InputError, match="not one image"):
        list(data.val_dataloader())
