"""Datasets in VOC format as people have them: no splits, odd names, odd images."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.doctor import near_duplicates
from datamodules.splits import write_lists
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import Annotation, VOCObject, read_split, write_annotation
from detector.errors import InputError

CAT = VOCObject("cat", (2.0, 3.0, 12.0, 9.0))
SIZE = (32, 24)


def add(folder: Path, stem: str, *objects: VOCObject, suffix=".jpg", size=SIZE, stated=None, name=None) -> Path:
    for part in ("JPEGImages", "Annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    path = folder / "JPEGImages" / f"{stem}{suffix}"
    seed = sum(map(ord, stem))
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, {"jp": "JPEG", "pn": "PNG", "ti": "TIFF"}[suffix.lower()[1:3]])
    annotation = Annotation(name or path.name, *(stated or size), objects)
    write_annotation(annotation, folder / "Annotations" / f"{stem}.xml")
    return path


def list_split(folder: Path, name: str, *stems: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def module(folder: Path, **options) -> VOCDataModule:
    arguments = {"root": str(folder), "num_workers": 0, "augmentation": "none"}
    return VOCDataModule(**arguments | options)


# ---- names and files ----


@pytest.mark.parametrize("suffix", [".JPG", ".JPEG", ".Jpg", ".png", ".PNG", ".tif"])
def test_suffixes(tmp_path, suffix):
    path = add(tmp_path, "a", CAT, suffix=suffix)
    list_split(tmp_path, "all", "a")
    dataset = module(tmp_path, train_splits=["all"], val_splits=["all"], allow_overlap=True).train_dataset
    assert dataset.image_path(0) == path and dataset.file_names == [f"a{suffix}"]
    with Image.open(path) as stored:
        np.testing.assert_array_equal(dataset[0][0].permute(1, 2, 0).numpy(), np.array(stored))


def test_names_with_blanks(tmp_path):
    stems = ["holiday photo", "shot 1", "shot -1", "shot"]
    for stem in stems:
        add(tmp_path, stem, CAT)
    list_split(tmp_path, "all", "holiday photo", "shot 1", "shot -1", "shot")
    list_split(tmp_path, "cat_all", "holiday photo  1", "shot 1 -1", "shot\t0")
    assert read_split(tmp_path / "ImageSets" / "Main" / "all.txt") == stems
    assert read_split(tmp_path / "ImageSets" / "Main" / "cat_all.txt") == ["holiday photo", "shot 1", "shot"]
    dataset = module(tmp_path, train_splits=["all"], val_splits=["all"], allow_overlap=True).train_dataset
    assert dataset.file_names == [f"{stem}.jpg" for stem in stems]


def test_the_name_of_the_annotation_counts_not_the_file_name_in_it(tmp_path):
    add(tmp_path, "a", CAT, size=(32, 24), name="b.jpg")
    add(tmp_path, "b", VOCObject("dog", (0.0, 0.0, 50.0, 40.0)), size=(60, 44), name="C:\\photos\\a.jpg")
    list_split(tmp_path, "all", "a", "b")
    data = module(tmp_path, train_splits=["all"], val_splits=["all"], allow_overlap=True)
    image, target = data.train_dataset[0]
    assert (image.shape, target["file_name"]) == ((3, 24, 32), "a.jpg")
    assert target["boxes"].tolist() == [[2, 3, 12, 9]] and target["labels"].tolist() == [1]
    assert data.train_dataset[1][1]["boxes"].tolist() == [[0, 0, 50, 40]]
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(InputError, match=r"b\.jpg: no such image .*its annotation states a\.jpg, which is there"):
        module(tmp_path, train_splits=["all"], val_splits=["all"], allow_overlap=True).setup("fit")


def turn(path: Path, orientation: int) -> None:
    with Image.open(path) as image:
        exif = image.getexif()
        exif[274] = orientation
        image.save(buffer := io.BytesIO(), "JPEG", exif=exif, quality=95)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("stated", "shape", "box"),
    [
        ((32, 24), (3, 24, 32), [2, 3, 30, 24]),  # as stored
        ((24, 32), (3, 32, 24), [2, 3, 24, 28]),  # as shown
        ((0, 0), (3, 32, 24), [2, 3, 24, 28]),
    ],
)
def test_boxes_and_pixels_of_turned_photographs_are_in_one_frame(tmp_path, stated, shape, box):
    turn(add(tmp_path, "a", VOCObject("cat", (2.0, 3.0, 30.0, 28.0)), stated=stated), 6)
    list_split(tmp_path, "all", "a")
    dataset = module(tmp_path, train_splits=["all"], val_splits=["all"], allow_overlap=True).train_dataset
    image, target = dataset[0]
    assert image.shape == shape
    assert dataset.sizes.tolist() == [list(shape[1:])]
    assert target["boxes"].tolist() == [box]


def test_xml_of_minimal_tools(tmp_path):
    add(tmp_path, "a")
    (tmp_path / "Annotations" / "a.xml").write_text(
        "<annotation><object><name>cat</name><bndbox><xmin>1.5</xmin><ymin>2</ymin><xmax>9.25</xmax><ymax>1e1</ymax>"
        "</bndbox></object></annotation>"
    )
    list_split(tmp_path, "all", "a")
    target = module(tmp_path, train_splits=["all"], val_splits=["all"], allow_overlap=True).train_dataset[0][1]
    assert target["boxes"].tolist() == [[0.5, 1, 9.25, 10]]
    assert target["difficult"].tolist() == [False]


# ---- splits made with a seed ----


@pytest.fixture
def without_splits(tmp_path) -> Path:
    for number in range(10):
        add(tmp_path / "data", f"img {number}", VOCObject("dog" if number == 7 else "cat", CAT.box))
    return tmp_path / "data"


def parts(data: VOCDataModule) -> tuple[list[str], list[str]]:
    data.setup("fit")
    return data.train_dataset.file_names, data.val_dataset.file_names


def test_a_dataset_without_splits_is_divided(without_splits, tmp_path, capsys):
    before = sorted(without_splits.rglob("*"))
    data = module(without_splits, val_fraction=0.3)
    data.splits_folder = tmp_path / "run" / "splits"
    assert data.class_names == ["cat", "dog"]
    train, val = parts(data)
    assert (len(train), len(val)) == (7, 3) and len({*train, *val}) == 10
    assert sorted(without_splits.rglob("*")) == before
    for name, names in (("train", train), ("val", val)):
        written = (tmp_path / "run" / "splits" / f"{name}.txt").read_text().splitlines()
        assert [f"{stem}.jpg" for stem in written] == names
    (line,) = capsys.readouterr().err.splitlines()
    assert "7 images to train and 3 to validate" in line and str(tmp_path / "run" / "splits") in line
    assert parts(module(without_splits, val_fraction=0.3, seed=5)) == (train, val)  # another seed of the training
    assert parts(module(without_splits, val_fraction=0.3, split_seed=5)) != (train, val)


def test_a_run_keeps_its_splits_when_the_dataset_grows(without_splits, tmp_path, capsys):
    def again(**options):
        data = module(without_splits, val_fraction=0.3, **options)
        data.splits_folder = tmp_path / "splits"
        return data

    first = parts(again())
    for number in range(10, 30):
        add(without_splits, f"img {number}", CAT)
    assert parts(again()) == first
    assert parts(module(without_splits, val_fraction=0.3)) != first
    with pytest.raises(InputError, match=r"split_seed 0, now 1"):
        again(split_seed=1).setup("fit")
    (without_splits / "Annotations" / first[1][0]).with_suffix(".xml").unlink()
    with pytest.raises(InputError, match=r"splits: 1 images of this run's splits \(img \d+\) are not in the dataset"):
        again().setup("fit")


def test_images_of_a_list_are_divided_and_test_images_are_left_alone(without_splits):
    list_split(without_splits, "some", *(f"img {number}" for number in range(6)))
    list_split(without_splits, "test", "img 8", "img 9")
    train, val = parts(module(without_splits, val_fraction=0.5, train_splits=["some"]))
    assert sorted(train + val) == [f"img {number}.jpg" for number in range(6)] and len(train) == 3
    data = module(without_splits, val_fraction=0.5, test_splits=["test"])
    train, val = parts(data)
    assert sorted(train + val) == [f"img {number}.jpg" for number in range(8)]
    data.setup("test")
    assert data.test_dataset.file_names == ["img 8.jpg", "img 9.jpg"]
    with pytest.raises(InputError, match=r"train_splits and --data\.test_splits share 1"):
        list_split(without_splits, "all", *(f"img {number}" for number in range(9)))
        module(without_splits, val_fraction=0.01, train_splits=["all"], test_splits=["test"]).setup("fit")


def test_near_duplicates_are_in_one_list_and_it_is_said(without_splits, tmp_path, capsys, monkeypatch):
    for number in range(4):  # of every one of these a copy at another size
        with Image.open(without_splits / "JPEGImages" / f"img {number}.jpg") as image:
            picture = image.resize((320, 240), Image.Resampling.BICUBIC)
        for name, size in ((f"img {number}", (320, 240)), (f"copy {number}", (160, 120))):
            add(without_splits, name, CAT, size=size)
            picture.resize(size).save(without_splits / "JPEGImages" / f"{name}.jpg", quality=80)
    for seed in range(6):
        train, val = parts(module(without_splits, val_fraction=0.3, split_seed=seed))
        assert (len(train), len(val)) == (10, 4)
        for number in range(4):
            assert (f"img {number}.jpg" in val) == (f"copy {number}.jpg" in val)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("; 8 images that show the same as another (copy 0 and img 0) are in the same list as that")

    def decode(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(near_duplicates, "fingerprint", decode)
    assert parts(module(without_splits, val_fraction=0.3, split_seed=5)) == (train, val)
    with pytest.raises(AssertionError, match="decoded again"):
        module(without_splits, val_fraction=0.3, split_seed=5, annotation_cache="none").setup("fit")
    monkeypatch.undo()
    picture.convert("L").rotate(90).resize((160, 120)).save(without_splits / "JPEGImages" / "copy 3.jpg")
    parts(module(without_splits, val_fraction=0.3, split_seed=5))
    assert "; 6 images that show" in capsys.readouterr().err


def test_lists_of_a_run_count_whatever_shows_the_same(without_splits, tmp_path):
    for number in range(10):
        add(without_splits, f"img {number}", CAT, size=(64, 48))
    (without_splits / "JPEGImages" / "img 1.jpg").write_bytes(
        (without_splits / "JPEGImages" / "img 0.jpg").read_bytes()
    )
    lists = {"train": [f"img {number}" for number in range(1, 10)], "val": ["img 0"]}
    write_lists(tmp_path / "splits", lists, {"val_fraction": 0.1, "split_seed": 0})
    data = module(without_splits, val_fraction=0.1)
    data.splits_folder = tmp_path / "splits"
    assert parts(data)[1] == ["img 0.jpg"]


def test_years_are_divided_with_equal_names_kept_apart(tmp_path):
    for year in ("2007", "2012"):
        for number in range(4):
            add(tmp_path / f"VOC{year}", f"{number}", VOCObject("sofa", CAT.box), size=(32, 24 + int(year) % 5))
        list_split(tmp_path / f"VOC{year}", "trainval", *map(str, range(4)))
    data = module(tmp_path, val_fraction=0.25, train_splits=["2007_trainval", "2012_trainval"])
    data.splits_folder = tmp_path / "splits"
    train, val = parts(data)
    assert (len(train), len(val)) == (6, 2)
    listed = [(tmp_path / "splits" / f"{part}.txt").read_text().split() for part in ("train", "val")]
    assert sorted(listed[0] + listed[1]) == [f"VOC{year}/{number}" for year in (2007, 2012) for number in range(4)]
    with pytest.raises(
        InputError, match=r"train_splits, which is empty; name at least one split, such as 2007_trainval"
    ):
        module(tmp_path, val_fraction=0.25)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--data.train_splits is empty", "--data.val_fraction 0.2"]),
        ({"train_splits": ["some"]}, ["--data.val_splits is empty", "--data.val_fraction 0.2"]),
        ({"val_fraction": 0.0}, ["--data.val_fraction is 0.0", "between 0 and 1"]),
        ({"val_fraction": 1.0}, ["--data.val_fraction is 1.0"]),
        ({"val_fraction": 0.2, "val_splits": ["some"]}, ["--data.val_splits is [some]", "one of the two"]),
    ],
)
def test_contradicting_options(without_splits, options, words):
    with pytest.raises(InputError) as caught:
        module(without_splits, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
