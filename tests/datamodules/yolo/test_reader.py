"""Datasets in YOLO's text format, as ultralytics, Roboflow, CVAT, Label Studio and labelImg leave them."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from datamodules.coco.reader import CocoFormat
from datamodules.doctor.examine import DoctorOptions, examine
from datamodules.voc.reader import VOCFormat
from datamodules.yolo.datamodule import YoloDataModule
from datamodules.yolo.reader import YoloFormat
from detector.errors import InputError

SIZE = (40, 20)
LAYOUTS = {  # images and labels, both with the split as {}
    "ultralytics": ("images/{}", "labels/{}"),
    "Roboflow": ("{}/images", "{}/labels"),
    "in one folder": ("{}", "{}"),
    "darknet's": ("JPEGImages/{}", "labels/{}"),
}
SPLITS = {"train": ("a", "b"), "valid": ("c",), "test": ("d",)}


def write(root: Path, image: str, label: str | None, text: str = "", orientation: int = 1) -> None:
    """Write noise that depends on the name, and a label file unless it is None."""
    path = root / image
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(sum(map(ord, path.name))).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    if label is not None:
        (root / label).parent.mkdir(parents=True, exist_ok=True)
        (root / label).write_text(text)


def write_layout(root: Path, layout: str, splits: dict[str, tuple[str, ...]] = SPLITS) -> Path:
    pictures, labels = LAYOUTS[layout]
    for split, names in splits.items():
        for name in names:
            text = f"{ord(name) % 2} 0.5 0.5 0.25 {(ord(name) - 95) / 20}\n"
            write(root, f"{pictures.format(split)}/{name}.jpg", f"{labels.format(split)}/{name}.txt", text)
    return root


def describe(root: Path, **content: object) -> None:
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def checked(root: Path, splits: list[str] | None = None) -> list[tuple[str, tuple[float, ...]]]:
    """All objects of splits, or of all images."""
    format = YoloFormat(root)
    format.check_root()
    members = format.list_others([], look=True) if splits is None else format.list_images(splits)
    records = format.read(members, format.class_names(splits or []))
    assert all(record.usable and not record.problems for record in records)
    return [(item.name, item.box) for record in records for item in record.objects if item.box is not None]


# a to d: heights 2, 3, 4, 5 of 20 pixels, around the centre (20, 10); a and c are of class 1.
OBJECTS = [
    ("dog", (15, 9, 25, 11)),
    ("cat", (15, 8.5, 25, 11.5)),
    ("dog", (15, 8, 25, 12)),
    ("cat", (15, 7.5, 25, 12.5)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dataset_without_splits(tmp_path, layout):
    write_layout(tmp_path, layout, {".": ("a", "b", "c", "d")})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert YoloFormat(tmp_path).offered() == []
    assert VOCFormat(tmp_path).offered() is None and CocoFormat(tmp_path).offered() is None
    assert checked(tmp_path) == OBJECTS
    data = YoloDataModule(str(tmp_path), val_fraction=0.5, num_workers=0)
    data.setup("fit")
    assert (data.class_names, len(data.train_dataset), len(data.val_dataset)) == (["cat", "dog"], 2, 2)
    with pytest.raises(InputError, match=r"has no split 'val'; there are none; --data\.val_fraction 0\.2 makes some"):
        YoloDataModule(str(tmp_path), ["val"], ["val"]).setup("fit")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_are_splits(tmp_path, layout):
    write_layout(tmp_path, layout)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    if layout == "darknet's":  # whose splits are lists
        for split, names in SPLITS.items():
            lines = [f"/home/me/darknet/data/JPEGImages/{split}/{name}.jpg\n" for name in names]
            (tmp_path / f"{split}.txt").write_text("".join(lines))
    assert YoloFormat(tmp_path).offered() == ["test", "train", "valid"]
    assert checked(tmp_path, ["train", "val", "test"]) == checked(tmp_path, ["train", "valid", "test"]) == OBJECTS
    data = YoloDataModule(str(tmp_path), ["train"], ["val"], ["test"], num_workers=0)
    data.setup()
    assert data.train_dataset.file_names == ["a.jpg", "b.jpg"] and data.test_dataset.file_names == ["d.jpg"]
    assert data.val_dataset[0][1]["boxes"].tolist() == [[15, 8, 25, 12]]
    assert data.val_dataset[0][1]["labels"].tolist() == [2] and not data.val_dataset[0][1]["difficult"].any()
    report = examine(DoctorOptions(YoloFormat(tmp_path)))
    assert report.problems == [] and report.splits == {"test": 1, "train": 2, "valid": 1}
    assert report.classes == {"cat": 2, "dog": 2}


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        ("ultralytics", {"path": "../animals", "train": "images/train", "val": "images/valid", "test": "images/test"}),
        (
            "ultralytics",
            {"path": "/content/other", "train": ["images/train"], "val": "images/valid/", "test": None},
        ),
        ("ultralytics", {"train": "train.txt", "val": "./valid.txt", "test": ""}),
        ("Roboflow", {"train": "../train/images", "val": "../valid/images", "test": "../test/images", "nc": 2}),
        ("Roboflow", {"train": "train/images", "validation": "valid/images"}),
    ],
)
@pytest.mark.parametrize("names", [["cat", "dog"], {0: "cat", 1: "dog"}])
def test_data_yaml(tmp_path, layout, content, names, monkeypatch):
    root = write_layout(tmp_path / "animals", layout)
    for split, stems in SPLITS.items():
        (root / f"{split}.txt").write_text("".join(f"./images/{split}/{stem}.jpg\n" for stem in stems))
    describe(
        root, names=names, **{k: v.replace("{}", "animals") if isinstance(v, str) else v for k, v in content.items()}
    )
    monkeypatch.chdir(tmp_path)
    for place in (root, root / "data.yaml", Path("animals")):
        assert checked(place, ["train", "val"]) == OBJECTS[:3]
        offered = ["train", "val", "test"] if content.get("test") else ["train", "val"]
        assert YoloFormat(place).offered() == offered
        members = YoloFormat(place).list_images(["val"])
        assert [member.name.endswith("/c.jpg") and "animals" not in member.name for member in members] == [True]
        assert len(YoloFormat(place).list_others(members, look=True)) == 3


def test_a_part_of_data_yaml_that_is_not_there(tmp_path):
    write_layout(tmp_path, "Roboflow", {"train": ("a", "b")})
    describe(tmp_path, names=["cat", "dog"], train="../train/images", val="../valid/images")
    assert YoloFormat(tmp_path).offered() == ["train"]
    with pytest.raises(InputError, match=r"valid/images: no such folder of images, nor list of them"):
        YoloDataModule(str(tmp_path), ["train"], ["val"]).setup("fit")
    with pytest.raises(InputError, match=r"data\.yaml: has no split 'holdout'; there are train$"):
        YoloDataModule(str(tmp_path), ["train"], ["holdout"]).setup("fit")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: {0: cat, one: dog}\ntrain: a", "has one where the number of a class"),
        ("names: [cat, cat]", "has no names, or one of them twice: cat, cat"),
        ("names: cats.txt", "has names cats.txt; a list, or a mapping"),
        ("train: a\nval: b", "has no names; a description of YOLO data has the keys names, train, val"),
        ("names: [cat", "is no YAML"),
    ],
)
def test_a_bad_data_yaml(tmp_path, text, words):
    write_layout(tmp_path, "ultralytics")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        YoloDataModule(str(tmp_path), ["train"], ["val"])
    assert words in str(caught.value) and "data.yaml" in str(caught.value)


def test_names_are_texts_and_numbers_may_have_gaps(tmp_path):
    write(tmp_path, "images/a.jpg", "labels/a.txt", "3 .5 .5 .5 .5\n1 .5 .5 .25 .5\n")
    (tmp_path / "data.yaml").write_text("nc: 2\nnames:\n  3: no\n  1: 007\n")
    format = YoloFormat(tmp_path)
    assert format.class_names([]) == ["007", "no"]
    (record,) = format.read(format.list_others([], True), ["007", "no"])
    assert [item.name for item in record.objects] == ["no", "007"]
    (tmp_path / "data.yaml").write_text("nc: 4\n")
    assert YoloFormat(tmp_path).class_names([]) == ["class_0", "class_1", "class_2", "class_3"]


def test_without_names_the_option_names_the_numbers(tmp_path):
    write_layout(tmp_path, "ultralytics")
    with pytest.raises(InputError, match=r"names no classes, in data\.yaml or classes\.txt; .* --data\.class_names"):
        YoloDataModule(str(tmp_path), ["train"], ["val"])
    data = YoloDataModule(str(tmp_path), ["train"], ["val"], class_names=["one", "two"])
    assert data.train_dataset[0][1]["labels"].tolist() == [2]
    assert set(examine(DoctorOptions(YoloFormat(tmp_path))).classes) == {"class_0", "class_1"}


def test_polygons_become_boxes_and_key_points_are_left_out(tmp_path, capsys):
    write(tmp_path, "images/a.jpg", "labels/a.txt", "1 0.1 0.5 0.5 0.1 0.75 0.75 0.2 0.6\n0 .5 .5 .5 .5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog")
    assert checked(tmp_path) == [("dog", (4, 2, 30, 15)), ("cat", (10, 5, 30, 15))]
    assert capsys.readouterr().err == f"{tmp_path}: polygons in label files are read as the boxes around them\n"
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .5 .5 0.1 0.2 2 0.3 0.4 1\n")
    describe(tmp_path, names=["cat", "dog"], kpt_shape=[2, 3])
    assert checked(tmp_path) == [("cat", (10, 5, 30, 15))]
    assert capsys.readouterr().err == ""


def test_boxes_are_of_the_picture_as_it_is_shown(tmp_path):
    write(tmp_path, "images/a.jpg", "labels/a.txt", "0 .25 .5 .5 .5\n", orientation=6)
    (tmp_path / "classes.txt").write_text("cat")
    format = YoloFormat(tmp_path)
    (record,) = format.read(format.list_others([], True), ["cat"])
    assert (record.size, record.upright) == ((20, 40), True)
    assert record.objects[0].box == (0, 10, 10, 30)


def test_rounded_numbers_reach_beyond_the_image_without_a_word(tmp_path):
    write(tmp_path, "images/a.jpg", "labels/a.txt", "0 0.333334 0.5 0.6667 1.000001\n0 .5 .5 1.02 .5\n0 .5 .5 1.1 .5\n")
    (tmp_path / "classes.txt").write_text("cat")
    format = YoloFormat(tmp_path)
    (record,) = format.read(format.list_others([], True), ["cat"])
    assert record.objects[0].box == (0, 0, 26.66736, 20)
    assert [item.box for item in record.objects[1:]] == [(0, 5, 40, 15)] * 2
    assert [(problem.kind, problem.object) for problem in record.problems] == [
        ("box_partly_outside", 2),
        ("duplicate_object", 2),
    ]


BROKEN = [
    ("2 .5 .5 .5 .5", "unknown_class", "is of the class 2; there are 0 to 1"),
    ("-1 .5 .5 .5 .5", "unknown_class", "is of the class -1"),
    ("0.5 .5 .5 .5 .5", "unknown_class", "is of the class 0.5"),
    ("0 .5 .5 .5", "incomplete_object", "has 4 columns; class, centre x"),
    ("0 .5 .5 .5 .5 .9", "incomplete_object", "has 6 columns"),
    ("0 nan .5 .5 .5", "incomplete_object", "is not of finite numbers"),
    ("0 .5 .5 .5 inf", "incomplete_object", "is not of finite numbers"),
    ("cat .5 .5 .5 .5", "incomplete_object", "is not of finite numbers"),
    ("0 .5 .5 0 .5", "negative_box", "has a width or height that is not positive"),
    ("0 .5 .5 .1 -.5", "negative_box", "has a width or height"),
    ("0 .5 .5 .5 .6 .5 .7", "negative_box", "has corners without an area"),
    ("0 1.4 .5 .1 .1", "box_outside", "wholly outside its image of 40 x 20 pixels"),
    ("0 20 10 4 4", "box_outside", "has coordinates in pixels; shares of the image, from 0 to 1, are needed"),
]


@pytest.mark.parametrize(("line", "kind", "words"), BROKEN)
def test_what_is_wrong_with_lines(tmp_path, line, kind, words):
    write(tmp_path, "images/a.jpg", "labels/a.txt", f"1 .5 .5 .25 .5\n\n{line}\n")
    write(tmp_path, "images/b.jpg", "labels/b.txt", "1 .5 .5 .25 .5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog")
    format = YoloFormat(tmp_path)
    record, _ = format.read(format.list_others([], True), ["cat", "dog"])
    (problem,) = record.problems
    label = tmp_path / "labels" / "a.txt"
    assert (problem.kind, problem.object, problem.file) == (kind, 1, str(label)) and problem.breaks
    assert words in problem.message and str(label) in problem.message
    assert record.objects[0].box == (15, 5, 25, 15) and record.objects[1].box is None
    options = {"val_fraction": 0.5, "num_workers": 0}
    with pytest.raises(InputError, match=r"a\.txt: object 1"):
        YoloDataModule(str(tmp_path), **options).setup("fit")
    data = YoloDataModule(str(tmp_path), on_error="skip", **options)
    data.setup("fit")
    assert len(data.train_dataset) + len(data.val_dataset) == 2


def test_images_without_labels_and_labels_without_images(tmp_path, capsys):
    write_layout(tmp_path, "ultralytics")
    describe(tmp_path, names=["cat", "dog"], train="images/train", val="images/valid", test="images/test")
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    (tmp_path / "images" / "valid" / "c.jpg").rename(tmp_path / "images" / "valid" / "e.jpg")
    (tmp_path / "labels" / "train" / "notes.txt").write_text("made by hand")
    report = examine(DoctorOptions(YoloFormat(tmp_path)))
    assert report.splits == {"train": 2, "val": 2, "test": 1} and report.image_files == 4
    found = {(problem.kind, Path(problem.file).relative_to(tmp_path).as_posix()) for problem in report.problems}
    assert found == {
        ("empty_image", "labels/train/a.txt"),
        ("empty_image", "labels/valid/e.txt"),
        ("missing_image", "images/valid/c.jpg"),
        ("unknown_size", "labels/valid/c.txt"),
    }
    with pytest.raises(InputError, match=r"images/valid/c\.jpg: no such image, but there is .*labels/valid/c\.txt"):
        YoloDataModule(str(tmp_path), ["train"], ["val"], num_workers=0).setup("fit")
    data = YoloDataModule(str(tmp_path), ["train"], ["val"], num_workers=0, on_error="skip")
    data.setup("fit")
    assert (data.train_dataset.file_names, data.val_dataset.file_names) == (["a.jpg", "b.jpg"], ["e.jpg"])
    assert len(data.train_dataset[0][1]["boxes"]) == 0
    assert "leaves out 1 images" in capsys.readouterr().err


def test_equal_names_in_two_folders_are_told_apart(tmp_path):
    write_layout(tmp_path, "ultralytics", {"train/one": ("a",), "train/two": ("a", "b"), "val": ("c",)})
    (tmp_path / "classes.txt").write_text("cat\ndog")
    data = YoloDataModule(str(tmp_path), ["train"], ["val"], num_workers=0)
    data.setup("fit")
    assert data.train_dataset.file_names == [f"images/train/{name}.jpg" for name in ("one/a", "two/a", "two/b")]
    assert data.ground_truth("train").image_names == ("images/train/one/a", "images/train/two/a", "images/train/two/b")
    assert data.val_dataset.file_names == ["c.jpg"]


def test_an_image_in_two_splits_is_a_leak_however_it_is_named(tmp_path):
    write_layout(tmp_path, "ultralytics")
    (tmp_path / "list.txt").write_text("images/train/b.jpg\nimages/valid/c.jpg\n")
    describe(tmp_path, names=["cat", "dog"], train="images/train", val="list.txt")
    with pytest.raises(InputError, match=r"train_splits and --data\.val_splits share 1 images \(b\.jpg\)"):
        YoloDataModule(str(tmp_path), ["train"], ["val"]).setup("fit")
    (tmp_path / "list.txt").write_text("images/valid/c.jpg\n" * 2)
    with pytest.raises(InputError, match=r"list\.txt: names the image .*c\.jpg more than once"):
        YoloDataModule(str(tmp_path), ["train"], ["val"]).setup("fit")


def test_other_formats_are_told(tmp_path, write_image, annotate):
    write_image(tmp_path, "a.jpg")
    annotate(tmp_path, "a")
    with pytest.raises(InputError, match=r"holds neither data\.yaml nor labels/ .*; it looks like --data_format voc$"):
        YoloDataModule(str(tmp_path), ["train"], ["val"])
    yolo = write_layout(tmp_path / "yolo", "Roboflow")
    with pytest.raises(InputError, match=r"it looks like --data_format yolo$"):
        VOCFormat(yolo).check_root()
    with pytest.raises(InputError, match=r"holds no JSON file; it looks like --data_format yolo$"):
        CocoFormat(yolo).list_images(["train"])
