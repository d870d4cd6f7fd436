"""Formats of one's own: what their images state is judged as that of ours, and what they raise is one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.doctor.examine import DoctorOptions, examine
from datamodules.ground_truth import read_ground_truth
from datamodules.own_format import LabelledImage, OwnFormat
from detector.errors import InputError
from experiments.dataset.formats import data_module_of, dataset_format

TURNED = 6  # the EXIF orientation of a picture that a camera stored on its side


class Listed(OwnFormat):
    """Splits and images from a JSON file; `fail` raises what a mistake would."""

    def __init__(self, root: str | Path, part: str = "all", times: int = 1, fail: bool = False) -> None:
        super().__init__(root)
        self.part, self.times, self.fail = part, times, fail

    @property
    def content(self) -> dict[str, list[dict[str, object]]]:
        return json.loads((self.root / f"{self.part}.json").read_text())

    def splits(self):
        return list(self.content)

    def images(self, split):
        if self.fail:
            raise KeyError("no such column")
        return [LabelledImage(**image) for image in self.content[split] for _ in range(self.times)]


class Half(OwnFormat):
    def splits(self):
        return ["train"]


@pytest.fixture
def write(tmp_path):
    """`write(train=[...], val=[...])`: images of 40 x 20 pixels by what is stated of them."""

    def call(part="all", **splits):
        for images in splits.values():
            for image in images:
                Image.new("RGB", (40, 20)).save(tmp_path / image["path"])
        (tmp_path / f"{part}.json").write_text(json.dumps(splits))
        return Listed(tmp_path, part)

    return call


def of(path, *boxes, names=None, **more):
    return {"path": path, "boxes": boxes, "names": names or ["cat"] * len(boxes)} | more


def test_boxes_difficult_flags_and_classes_of_all_splits(write):
    train = [of("a.png", [1, 2, 11, 12], [0, 0, 40, 20], names=["dog", "cat"], difficult=[False, True]), of("b.png")]
    format = write(train=train, val=[of("c.png", [-5, 0, 10, 30], names=["ant"])])
    assert format.offered() == ["train", "val"] and format.class_names(["val"]) == ["ant", "cat", "dog"]
    truth = read_ground_truth(format, ["train", "val"])
    assert truth.image_names == ("a", "b", "c") and truth.class_names == ("ant", "cat", "dog")
    assert truth.objects.box.tolist() == [[1, 2, 11, 12], [0, 0, 40, 20], [0, 0, 10, 20]]
    assert truth.objects.label.tolist() == [3, 2, 1] and truth.objects.difficult.tolist() == [False, True, False]
    assert truth.objects.image_id.tolist() == [0, 0, 2] and truth.sizes.tolist() == [[20, 40]] * 3
    assert [member.name for member in format.list_others(format.list_images(["train"]), look=True)] == ["c.png"]


def test_shares_of_the_image_as_it_is_shown(write, tmp_path):
    format = write(train=[of("a.png", [0.25, 0.5, 0.5, 1.0], relative=True)])
    exif = Image.Exif()
    exif[0x0112] = TURNED
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png", exif=exif)
    (record,) = format.read(format.list_images(["train"]), None)
    assert record.size == (20, 40) and record.upright and record.objects[0].box == (5, 20, 10, 40)


def test_sizes_that_are_stated_serve_without_images(write, tmp_path):
    format = write(train=[of("a.png", [0, 0, 0.5, 0.5], relative=True, size=[80, 60]), of("b.png", [0, 0, 9, 9])])
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    first, second = format.read(format.list_images(["train"]), None)
    assert first.objects[0].box == (0, 0, 40, 30) and first.size == (80, 60) and second.size == (0, 0)
    assert [problem.kind for problem in first.problems] == ["missing_image"]
    assert {problem.kind for problem in second.problems} == {"missing_image", "unknown_size"}


def test_what_is_wrong_with_objects_is_a_problem_of_each(write):
    boxes = [[9, 9, 3, 12], [1, 2, 3], [1, 2, 3, "x"], [50, 0, 60, 9], [float("nan"), 0, 1, 1], [0, 0, 5, 5]]
    report = examine(DoctorOptions(write(train=[of("a.png", *boxes)])))
    found = [(problem.object, problem.kind) for problem in report.problems]
    assert found == [
        *((0, "negative_box"), (1, "incomplete_object"), (2, "incomplete_object")),
        *((3, "box_outside"), (4, "incomplete_object")),
    ]
    assert "object 1 (cat, a.png) has the box [1, 2, 3], which is not four finite numbers" in (
        report.problems[1].message
    )
    assert report.boxes.tolist() == [[0, 0, 5, 5]] and report.splits == {"train": 1}


def test_the_same_image_in_two_splits_leaks(write):
    format = write(train=[of("a.png", [0, 0, 5, 5])], val=[of("a.png", [0, 0, 5, 5])])
    kinds = [problem.kind for problem in examine(DoctorOptions(format)).problems]
    assert kinds == ["leak_by_name"]
    data = data_module_of(f"{__name__}.Listed")(str(format.root), ["train"], ["val"])
    with pytest.raises(InputError, match=r"train_splits and --data\.val_splits share 1 images \(a\.png\)"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere.Format", "nowhere.Format: No module named 'nowhere'"),
        (f"{__name__}.Nothing", "has no attribute 'Nothing'"),
        ("pathlib.Path", "pathlib.Path: is not a class that inherits from datamodules.dataset_format.DatasetFormat"),
        (f"{__name__}.Half", "Half: is not a class that inherits from .* and has all its methods"),
        ({"class_path": f"{__name__}.Listed", "init_args": {"parts": "x"}}, "Listed: there is no option parts"),
        ({"class_path": f"{__name__}.Listed", "init_args": {"times": "x"}}, "Listed: --times x: must be a whole"),
        (
            {"class_path": f"{__name__}.Listed", "init_args": {"fail": True}},
            r"images\('train'\): KeyError: .*no such col",
        ),
        ({"class_path": f"{__name__}.Listed", "init_args": {"part": "none"}}, r"Listed: splits\(\): FileNotFoundError"),
        ({"class_path": f"{__name__}.Listed", "init_args": {"times": 2}}, "names the image a.png more than once"),
        ({"class_path": f"{__name__}.Listed", "init_args": {"part": "counts"}}, "a.png: has 1 boxes, 2 names and 0 fl"),
        ({"class_path": f"{__name__}.Listed", "init_args": {"part": "names"}}, "a.png: 3 is no name of a class"),
        ({"class_path": f"{__name__}.Listed", "init_args": [1]}, r"init_args is \[1\]"),
        ("pascal", "pascal: there are voc, coco, yolo"),
    ],
)
def test_what_is_wrong_with_the_class_is_one_line(write, tmp_path, given, words):
    write("counts", train=[of("a.png", [0, 0, 5, 5], names=["a", "b"])])
    write("names", train=[of("a.png", [0, 0, 5, 5], names=[3])])
    write(train=[of("a.png", [0, 0, 5, 5])])
    with pytest.raises(InputError, match=words) as caught:
        read_ground_truth(dataset_format(given, tmp_path), ["train"])
    assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there(write):
    with pytest.raises(InputError, match=r"has no split 'vla'; there are train, val"):
        write(train=[], val=[]).list_images(["vla"])
    assert write(train=[], val=[]).list_images(["vla"], missing_ok=True) == []


def test_arrays_serve_as_lists():
    image = LabelledImage("a.png", np.zeros((2, 4)), np.array(["a", "b"]), np.array([True, False]))
    assert len(image.boxes) == 2
