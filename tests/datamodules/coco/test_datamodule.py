import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.coco.datamodule import CocoDataModule
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import read_annotation, read_split
from detector.errors import InputError


def save_image(path: Path, size: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)
    return path


def write(
    path: Path, images: list[tuple[int, str, int, int]], objects: list[tuple[int, int, list[float], int]]
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "images": [dict(zip(("id", "file_name", "width", "height"), image, strict=True)) for image in images],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for n, (image, category, box, crowd) in enumerate(objects)
        ],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO's own layout: train2017 of b (two objects, the second a crowd) and c (none), val2017 of another b."""
    folder = tmp_path / "coco"
    save_image(folder / "train2017" / "b.png", (32, 24))
    save_image(folder / "train2017" / "c.png", (20, 30))
    save_image(folder / "val2017" / "b.png", (60, 44))
    write(
        folder / "annotations" / "instances_train2017.json",
        [(9, "b.png", 32, 24), (4, "c.png", 20, 30)],
        [(9, 18, [1.5, 2, 10.25, 30], 0), (9, 3, [0, 0, 32, 24], 1)],
    )
    write(folder / "annotations" / "instances_val2017.json", [(9, "b.png", 60, 44)], [(9, 3, [50, 40, 4, 3], 0)])
    return folder


def module(root: Path, **changes: Any) -> CocoDataModule:
    options = {"train_splits": ["train2017"], "val_splits": ["val2017"], "num_workers": 0, "augmentation": "none"}
    return CocoDataModule(str(root), **options | changes)


def test_samples(root):
    data = module(root)
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]  # ids 3 and 18
    assert data.train_dataset.file_names == ["b.png", "c.png"]
    image, target = data.train_dataset[0]
    assert image.shape == (3, 24, 32) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[1.5, 2, 11.75, 24], [0, 0, 32, 24]]  # clipped to the image
    assert target["labels"].tolist() == [2, 1]
    assert target["difficult"].tolist() == [False, True]
    assert target["image_id"].item() == 0
    assert data.train_dataset[1][1]["boxes"].shape == (0, 4)
    assert data.val_dataset[0][0].shape == (3, 44, 60)  # its own b.png
    assert data.val_dataset[0][1]["boxes"].tolist() == [[50, 40, 54, 43]]


def test_both_formats_give_the_same_samples(mini_voc, tmp_path):
    """MiniVOC written down as COCO JSON."""
    voc = VOCDataModule(str(mini_voc), ["train"], ["val"], num_workers=0, batch_size=3, seed=4)
    names = voc.class_names
    for split in ("train", "val"):
        stems = read_split(mini_voc / "ImageSets" / "Main" / f"{split}.txt")
        images, annotations = [], []
        for number, stem in enumerate(stems, start=100):
            annotation = read_annotation(mini_voc / "Annotations" / f"{stem}.xml")
            images.append({"id": number, "file_name": f"{stem}.jpg", "width": annotation.width})
            for item in annotation.objects:
                x1, y1, x2, y2 = item.box
                box = [x1, y1, x2 - x1, y2 - y1]
                category = 2 * names.index(item.name) + 5
                annotations.append(
                    {"image_id": number, "category_id": category, "bbox": box, "iscrowd": int(item.difficult)}
                )
        categories = [{"id": 2 * index + 5, "name": name} for index, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories[::-1]}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    coco = CocoDataModule(
        str(tmp_path),
        ["train"],
        ["val.json"],
        image_dirs=[str(mini_voc / "JPEGImages")],
        num_workers=0,
        batch_size=3,
        seed=4,
    )
    assert coco.class_names == names
    for ours, theirs in (
        (coco.train_dataloader(), voc.train_dataloader()),
        (coco.val_dataloader(), voc.val_dataloader()),
    ):
        batches = list(zip(ours, theirs, strict=True))
        assert len(batches) > 1
        for (images, targets), (voc_images, voc_targets) in batches:
            assert all(map(torch.equal, images, voc_images))
            for target, voc_target in zip(targets, voc_targets, strict=True):
                assert target.keys() == voc_target.keys()
                assert target["file_name"] == voc_target["file_name"]
                for key in ("boxes", "labels", "difficult", "image_id"):
                    assert target[key].dtype == voc_target[key].dtype
                    assert torch.equal(target[key], voc_target[key])


@pytest.mark.parametrize(
    "place",
    ["train.json", "annotations/train.json", "annotations/instances_train.json", "train/_annotations.coco.json"],
)
@pytest.mark.parametrize("images", ["", "images", "train", "images/train", "beside"])
def test_layouts(tmp_path, place, images):
    path = write(tmp_path / place, [(1, "sub/b.png", 32, 24)], [])
    image = save_image((path.parent if images == "beside" else tmp_path / images) / "sub" / "b.png", (32, 24))
    data = module(tmp_path, train_splits=["train"], val_splits=[place], allow_overlap=True)
    data.setup("fit")
    assert data.train_dataset.image_path(0) == image
    assert data.train_dataset.file_names == ["sub/b.png"]


def test_class_names_can_be_given_and_files_are_joined(root):
    data = module(root, train_splits=["train2017", "val2017"], val_splits=["val2017"], allow_overlap=True)
    assert data.train_dataset.file_names == ["b.png", "c.png", "b.png"]
    assert [len(data.train_dataset.target(index)["labels"]) for index in range(3)] == [2, 0, 1]
    given = module(root, class_names=["dog", "bird", "cat"])
    assert given.train_dataset.target(0)["labels"].tolist() == [1, 3]


def test_a_file_is_divided(root, tmp_path, capsys):
    images = [(number, f"{number:03}.png", 32, 24) for number in range(1, 11)]
    for _, name, *_ in images:
        save_image(root / "images" / name, (32, 24))
    write(root / "all.json", images, [])
    data = module(root, train_splits=["all"], val_splits=[], val_fraction=0.2)
    data.splits_folder = tmp_path / "splits"
    data.setup("fit")
    names = data.train_dataset.file_names, data.val_dataset.file_names
    assert [len(part) for part in names] == [8, 2] and len({*names[0], *names[1]}) == 10
    assert (tmp_path / "splits" / "val.txt").read_text().split() == names[1]
    assert "8 images to train and 2 to validate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": "nowhere"}, ["--data.root", "nowhere", "no such folder"]),
        (
            {"train_splits": ["train2018"]},
            ["train2018: no such annotation file", "annotations/instances_train2017.json"],
        ),
        ({"val_splits": []}, ["--data.val_splits is empty"]),
        (
            {"train_splits": [], "val_splits": [], "val_fraction": 0.2},
            ["--data.train_splits", "name at least one file"],
        ),
        ({"class_names": ["cat", "cat"]}, ["--data.class_names", "twice"]),
    ],
)
def test_bad_arguments_fail_on_construction(root, changes, words):
    with pytest.raises(InputError) as caught:
        module(**{"root": root, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "changes", "words"),
    [
        (lambda r: (r / "train2017" / "b.png").unlink(), {}, ["b.png: no such image", "instances_train2017.json"]),
        (lambda r: (r / "train2017" / "b.png").write_text("text"), {}, ["b.png: not a readable image"]),
        (lambda r: None, {"class_names": ["dog"]}, ["annotations[1] (cat, b.png)", "no known class", "dog"]),
        (lambda r: save_image(r / "train2017" / "b.png", (12, 1)), {}, ["annotations[0] (dog, b.png)", "outside"]),
        (
            lambda r: None,
            {"image_dirs": ["val2017"], "allow_overlap": True},
            ["c.png: no such image", "--data.image_dirs"],
        ),
        (lambda r: None, {"image_dirs": []}, ["--data.image_dirs is empty"]),
        (lambda r: None, {"val_splits": ["train2017"]}, ["share 2 images (b.png, c.png)"]),
        (
            lambda r: None,
            {"train_splits": ["train2017", "annotations/instances_train2017.json"], "allow_overlap": True},
            ["another of the splits"],
        ),
    ],
)
def test_setup_names_what_is_wrong(root, break_it, changes, words):
    break_it(root)
    with pytest.raises(InputError) as caught:
        module(root, **changes).setup("fit")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_skip_leaves_out_what_cannot_be_used(root, capsys):
    save_image(root / "train2017" / "b.png", (32, 24))
    (root / "train2017" / "c.png").write_text("text")
    data = module(root, class_names=["dog", "horse"], val_splits=["train2017"], allow_overlap=True, on_error="skip")
    data.setup("fit")
    assert data.train_dataset.file_names == ["b.png"]
    assert data.train_dataset.target(0)["labels"].tolist() == [1]
    said = capsys.readouterr().err
    assert "leaves out 2 images" in said and "unreadable_image 2" in said and "unknown_class 2" in said


# ---- bad objects, categories that are none, ids ----


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BAD = [
    ({"bbox": [1, 1, 5, 0]}, "negative_box"),
    ({"bbox": []}, "incomplete_object"),
    ({}, "incomplete_object"),
    ({"bbox": [1, 1, float("nan"), 4]}, "incomplete_object"),
    ({"bbox": [1, 1, 3, 4], "iscrowd": "maybe"}, "incomplete_object"),
    ({"bbox": [1, 1, 3, 4], "category_id": 77}, "unknown_class"),
    ({"bbox": [1, 1, 3, 4], "image_id": 77}, "incomplete_object"),
    ({"bbox": [90, 1, 3, 4]}, "box_outside"),
]


def spoil(root: Path) -> Path:
    """The training file with all of them, before and behind its two good objects."""
    path = root / "annotations" / "instances_train2017.json"
    bad = [{"id": 50 + n, "image_id": 9, "category_id": 18, **values} for n, (values, _) in enumerate(BAD)]
    edit(path, lambda content: content.update(annotations=bad[:4] + content["annotations"] + bad[4:]))
    return path


def test_every_bad_object_is_listed(root):
    path = spoil(root)
    with pytest.raises(InputError) as caught:
        module(root).setup("fit")
    assert str(caught.value).startswith(f"{path}: annotations[0] has bbox [1, 1, 5, 0] (x, y, width, height)")
    *lines, last = caught.value.details
    assert "--data.on_error skip" in last and len(lines) == len(BAD)
    places = {line.partition("annotations[")[2].partition("]")[0]: line.partition(":")[0] for line in lines}
    assert places == {str(n if n < 4 else n + 2): kind for n, (_, kind) in enumerate(BAD)}


def test_skip_leaves_out_the_bad_objects_and_writes_all_of_them_down(root, tmp_path, capsys):
    spoil(root)
    data = module(root, on_error="skip")
    data.report_folder = tmp_path / "run"
    data.setup("fit")
    assert data.train_dataset.file_names == ["b.png", "c.png"]
    assert data.train_dataset.target(0)["boxes"].tolist() == [[1.5, 2, 11.75, 24], [0, 0, 32, 24]]
    assert f"leaves out 0 images and {len(BAD)} objects" in capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "data_problems.json").read_text())
    assert sorted(one["object"] for one in written) == [0, 1, 2, 3, 6, 7, 8, 9]


def test_what_is_wrong_is_listed_once_where_a_file_is_divided(root):
    spoil(root)
    with pytest.raises(InputError) as caught:
        module(root, val_splits=[], val_fraction=0.5).setup("fit")
    assert len(caught.value.details) == len(BAD) + 1


def test_skip_leaves_out_images_whose_entry_is_bad(root, capsys):
    path = root / "annotations" / "instances_train2017.json"
    more = [{"id": 9.5, "file_name": "x.png"}, {"id": 5, "file_name": None}, {"id": 4, "file_name": "other.png"}]
    edit(path, lambda content: content["images"].extend(more))
    with pytest.raises(InputError, match=r"images\[2\] has id 9\.5; a whole number"):
        module(root).setup("fit")
    data = module(root, on_error="skip")
    data.setup("fit")
    assert data.train_dataset.file_names == ["b.png"]
    assert "leaves out 4 images and 0 objects (unreadable_annotation 2, named_twice 1)" in capsys.readouterr().err


def test_what_was_read_although_it_is_not_as_it_should_be_is_said_once(root, capsys):
    edit(
        root / "annotations" / "instances_train2017.json",
        lambda content: content["annotations"][0].update(iscrowd=None, bbox=[], segmentation=[[1, 2, 9, 2, 9, 7]]),
    )
    data = module(root)
    data.setup("fit")
    data.setup("validate")
    assert data.train_dataset.target(0)["boxes"].tolist() == [[1, 2, 9, 7], [0, 0, 32, 24]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("instances_train2017.json: 1 annotations with" in line for line in lines)


@pytest.mark.parametrize(("name", "classes"), [("animals", ["cat", "dog"]), ("cat", ["cat", "dog"])])
def test_the_root_category_of_an_export_is_no_class(root, capsys, name, classes):
    def add_root(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["supercategory"] = name
        content["categories"].append({"id": 0, "name": name, "supercategory": "none"})

    for path in (root / "annotations").iterdir():
        edit(path, add_root)
    data = module(root)
    assert data.class_names == classes
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(f"the category {name!r} (id 0) is left out" in line for line in said)  # two files
    data.setup("fit")
    assert data.train_dataset.target(0)["labels"].tolist() == [2, 1]
    assert data.val_dataset.category_ids == [3, 18]
    if name == "animals":  # of which there is one in the other file, so that it is a class in both
        content = {"image_id": 9, "category_id": 0, "bbox": [1, 1, 5, 5]}
        edit(root / "annotations" / "instances_val2017.json", lambda one: one["annotations"].append(content))
        assert module(root).class_names == ["animals", "cat", "dog"]
        assert capsys.readouterr().err == ""


def test_a_category_without_objects_is_a_class(root):
    for path in (root / "annotations").iterdir():
        edit(path, lambda content: content["categories"].append({"id": 1, "name": "ape", "supercategory": "animals"}))
    assert module(root).class_names == ["ape", "cat", "dog"]


def test_results_have_the_ids_of_the_file(root):
    data = module(root, class_names=["dog", "bird", "cat"], val_splits=["train2017"], allow_overlap=True)
    assert data.val_dataset.image_ids == [9, 4]
    assert data.val_dataset.category_ids == [18, 19, 3]  # that of a class which is no category is free
    divided = module(root, val_splits=[], val_fraction=0.5)
    expected = {"b.png": 9, "c.png": 4}
    assert divided.val_dataset.image_ids == [expected[name] for name in divided.val_dataset.file_names]
    assert divided.val_dataset.category_ids == [3, 18]


def test_ids_of_files_that_contradict_each_other_are_not_used(root, capsys):
    both = module(root, val_splits=["train2017", "val2017"], allow_overlap=True)
    assert both.val_dataset.image_ids is None and both.val_dataset.category_ids is None  # two images of id 9
    assert "give one id to different images" in capsys.readouterr().err
    edit(root / "annotations" / "instances_val2017.json", lambda content: content["images"][0].update(id=8))
    edit(root / "annotations" / "instances_val2017.json", lambda content: content["annotations"][0].update(image_id=8))
    both = module(root, val_splits=["train2017", "val2017"], allow_overlap=True)
    assert both.val_dataset.image_ids == [9, 4, 8]
    assert capsys.readouterr().err == ""
