from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.checks import similar_classes, spelling_of
from datamodules.doctor import near_duplicates
from datamodules.doctor.examine import DoctorOptions, examine
from datamodules.doctor.near_duplicates import fingerprint
from datamodules.image_cache import ImageFile
from datamodules.problems import KINDS
from datamodules.voc.format import Annotation, VOCObject, write_annotation
from datamodules.voc.reader import VOCFormat
from detector import VOC_CLASSES
from detector.errors import InputError


def _found(report, root):
    return Counter(
        (Path(problem.file).relative_to(root).as_posix(), problem.object, problem.kind) for problem in report.problems
    )


def test_finds_one_of_each_defect_and_nothing_else(broken_dataset):
    root = broken_dataset.root
    report = examine(DoctorOptions(VOCFormat(root), class_names=broken_dataset.class_names))
    assert _found(report, root) == Counter(broken_dataset.problems)
    kinds = {kind for _, _, kind in broken_dataset.problems}
    assert set(KINDS) - kinds == {"unknown_size", "similar_class", "dark_images"}  # tested below
    breaking = {(file, index, kind) for file, index, kind in broken_dataset.stops}
    splits = {item for item in broken_dataset.problems if item[2] in ("unusable_split", "named_twice")}
    stops = [problem for problem in report.problems if problem.breaks]
    assert {(Path(p.file).relative_to(root).as_posix(), p.object, p.kind) for p in stops} == breaking | splits


def test_chosen_splits_are_all_that_is_examined(broken_dataset):
    root = broken_dataset.root
    options = DoctorOptions(
        VOCFormat(root), {"train": ["train"], "val": ["val"]}, class_names=broken_dataset.class_names
    )
    report = examine(options)
    missing = {item for item in broken_dataset.problems if item[2] in ("unusable_split", "named_twice", "not_in_split")}
    assert _found(report, root) == Counter(broken_dataset.problems - missing)
    assert {(Path(p.file).relative_to(root).as_posix(), p.object, p.kind) for p in report.problems if p.breaks} == (
        broken_dataset.stops
    )
    assert report.splits == {"train": 15, "val": 4}


def test_messages_name_what_is_wrong(broken_dataset):
    report = examine(DoctorOptions(VOCFormat(broken_dataset.root), class_names=broken_dataset.class_names))
    for problem in report.problems:
        assert problem.file in problem.message and "\n" not in problem.message
        assert problem.object is None or f"object {problem.object}" in problem.message
    by_kind = {problem.kind: problem for problem in report.problems}
    assert "perhaps 'ellipse' is meant" in by_kind["misspelt_class"].message
    assert "'zebra'" in by_kind["unknown_class"].message and "perhaps" not in by_kind["unknown_class"].message
    assert "1234 x" in by_kind["size_mismatch"].message
    assert "which is in val too" in by_kind["leak_by_name"].message
    assert by_kind["box_outside"].effect.endswith("leaves out this object")
    assert by_kind["truncated_image"].effect.endswith("leaves out this image")


def test_a_healthy_dataset_has_no_problems(mini_voc):
    report = examine(DoctorOptions(VOCFormat(mini_voc)))
    assert report.problems == []
    assert report.splits == {"odd": 7, "test": 4, "train": 12, "trainval": 16, "val": 4}
    assert (report.images, report.image_files, report.empty) == (20, 20, 0)


def test_processes_change_nothing(broken_dataset, monkeypatch):
    monkeypatch.setattr("datamodules.doctor.examine.PARALLEL_FROM", 1)
    options = DoctorOptions(VOCFormat(broken_dataset.root), class_names=broken_dataset.class_names)
    assert _found(examine(options), broken_dataset.root) == Counter(broken_dataset.problems)


# ---- small datasets made here ----


def _dataset(folder: Path, objects: dict[str, list[VOCObject]], size=(40, 30), images=True, **splits) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (stem, items) in enumerate(objects.items()):
        write_annotation(Annotation(f"{stem}.jpg", *size, tuple(items)), folder / "Annotations" / f"{stem}.xml")
        if images:
            pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{stem}.jpg", quality=95)
    for name, stems in splits.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    return folder


def _cat(name="cat", box=(2.0, 3.0, 12.0, 9.0), **flags) -> VOCObject:
    return VOCObject(name, box, **flags)


def test_counts(tmp_path):
    objects = {"a": [_cat(), _cat("dog", difficult=True), _cat("dog", (1.0, 1.0, 5.0, 5.0))], "b": [], "c": [_cat()]}
    report = examine(DoctorOptions(VOCFormat(_dataset(tmp_path, objects, train=["a", "b"], val=["c"]))))
    assert report.classes == {"cat": 2, "dog": 2} and report.difficult == {"cat": 0, "dog": 1}
    assert report.class_images == {"cat": 2, "dog": 1}
    assert (report.images, report.objects, report.empty) == (3, 4, 1)
    assert report.boxes.tolist() == [[2, 3, 12, 9], [2, 3, 12, 9], [1, 1, 5, 5], [2, 3, 12, 9]]


def test_classes_that_look_like_spellings_of_another(tmp_path):
    objects = {f"i{n:02}": [_cat("person"), _cat("car")] for n in range(12)}
    objects["i03"] = [_cat("Person"), _cat("perzon"), _cat("cat")]
    report = examine(DoctorOptions(VOCFormat(_dataset(tmp_path, objects, train=list(objects)))))
    assert _found(report, tmp_path) == Counter(
        {("Annotations/i03.xml", 0, "similar_class"): 1, ("Annotations/i03.xml", 1, "similar_class"): 1}
    )
    assert not any(problem.breaks for problem in report.problems)


@pytest.mark.parametrize(
    ("counts", "similar"),
    [
        ({"traffic light": 3, "traffic_light": 90, "Traffic-Lights": 1}, {"traffic light", "Traffic-Lights"}),
        ({"cat": 500, "car": 3, "bat": 1}, set()),  # short names are alike by chance
        ({"level10": 900, "level11": 3}, set()),
        ({"horse": 50, "house": 40}, set()),  # both are frequent
        ({"motorbike": 500, "motorbyke": 5, "motor": 2}, {"motorbyke"}),
    ],
)
def test_similar_classes(counts, similar):
    found = similar_classes(counts)
    assert set(found) == similar
    assert all(counts[to] > counts[name] for name, to in found.items())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *(("Aeroplane", "aeroplane"), ("airplane", "aeroplane"), ("trian", "train"), ("dining table", "diningtable")),
        *(("persons", "person"), ("Tv-Monitor", "tvmonitor"), ("zebra", None), ("bicycel", "bicycle")),
    ],
)
def test_spelling_of(name, known):
    assert spelling_of(name, VOC_CLASSES) == known


def test_leaks_follow_what_splits_are_for(tmp_path):
    stems = list("abcdefgh")
    splits = {
        "train": ["a", "b", "c"],
        "val": ["d", "e"],
        "trainval": ["a", "b", "c", "d", "e"],
        "test": ["f", "e"],
        "first_fold": ["a", "f"],
        "cat_train": ["a  1", "b -1", "g  0"],  # a class's split file, which shares images with train
        "rest": ["g", "h"],
    }
    folder = _dataset(tmp_path, {stem: [_cat()] for stem in stems}, **splits)
    report = examine(DoctorOptions(VOCFormat(folder)))
    assert _found(report, folder) == Counter([("ImageSets/Main/trainval.txt", None, "leak_by_name")])
    assert "names e, which is in test and val too" in report.problems[0].message
    assert "cat_train" not in report.splits
    chosen = examine(DoctorOptions(VOCFormat(folder), {"train": ["train"], "test": ["first_fold"]}))
    assert _found(chosen, folder) == Counter([("ImageSets/Main/train.txt", None, "leak_by_name")])
    again = examine(DoctorOptions(VOCFormat(folder), {"train": ["train", "first_fold"], "val": ["val"]}))
    assert _found(again, folder) == Counter([("ImageSets/Main/first_fold.txt", None, "named_twice")])


def test_years_are_told_apart(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        _dataset(
            tmp_path / year, {"a": [_cat(), _cat("moose")]}, trainval=["a"], test=[] if year == "VOC2012" else ["b"]
        )
        (tmp_path / year / "JPEGImages" / "a.jpg").unlink()
    _dataset(tmp_path / "VOC2007", {"b": [_cat()]}, images=False)
    report = examine(
        DoctorOptions(VOCFormat(tmp_path), {"train": ["2012_trainval"], "val": ["2007_trainval"]}, images=False)
    )
    found = _found(report, tmp_path)
    assert {item for item in found if item[2] != "class_without_objects"} == {
        ("VOC2007/Annotations/a.xml", 1, "unknown_class"),
        ("VOC2012/Annotations/a.xml", 1, "unknown_class"),
    }
    assert found["", None, "class_without_objects"] + found[".", None, "class_without_objects"] == 19
    assert report.splits == {"2012_trainval": 1, "2007_trainval": 1}


def test_without_images(tmp_path):
    folder = _dataset(
        tmp_path, {"a": [_cat(box=(30.0, 3.0, 45.0, 9.0))], "b": [_cat()]}, images=False, train=["a", "b"]
    )
    path = folder / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("<width>40</width>", ""))
    expected = [("Annotations/a.xml", 0, "box_partly_outside"), ("Annotations/b.xml", None, "unknown_size")]
    assert _found(examine(DoctorOptions(VOCFormat(folder), images=False)), folder) == Counter(expected)
    report = examine(DoctorOptions(VOCFormat(folder)))  # one line, not one for each image
    assert _found(report, folder) == Counter([*expected, ("JPEGImages", None, "missing_image")])
    assert [problem.kind for problem in report.problems if problem.breaks] == ["missing_image"]


def test_files_that_no_split_names_break_nothing(tmp_path):
    folder = _dataset(tmp_path, {"a": [_cat()], "b": [_cat()]}, train=["a"])
    (folder / "JPEGImages" / "b.jpg").write_text("no image")
    report = examine(DoctorOptions(VOCFormat(folder)))
    assert _found(report, folder) == Counter(
        [("JPEGImages/b.jpg", None, "unreadable_image"), ("JPEGImages/b.jpg", None, "not_in_split")]
    )
    assert not any(problem.breaks for problem in report.problems)
    (folder / "ImageSets" / "Main" / "train.txt").unlink()  # splits are yet to be made, of all that is annotated
    report = examine(DoctorOptions(VOCFormat(folder)))
    assert [(problem.kind, problem.breaks) for problem in report.problems] == [("unreadable_image", True)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": VOCFormat("nowhere")}, "nowhere"),
        ({"splits": {"train": ["trian"]}}, "trian.txt.*holds train"),
        ({"class_names": ["cat", "cat"]}, "twice"),
    ],
)
def test_bad_usage(tmp_path, options, words):
    folder = _dataset(tmp_path, {"a": [_cat()]}, train=["a"])
    with pytest.raises(InputError, match=words):
        examine(DoctorOptions(**{"format": VOCFormat(folder)} | options))


# ---- copies ----


def _picture(seed: int, size=(300, 200)) -> Image.Image:
    """Something with large and small structure."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(small, dtype=np.int64) + noise).clip(0, 255).astype(np.uint8))


def test_copies_are_told_from_pictures_with_the_same_hash(tmp_path, monkeypatch):
    picture = _picture(0)
    picture.save(tmp_path / "0.png")
    picture.save(tmp_path / "1.jpg", quality=50)
    picture.resize((150, 100)).save(tmp_path / "2.jpg")
    _picture(1).save(tmp_path / "3.png")
    ramp = np.linspace(0, 250, 300)[None, :, None].repeat(200, 0).repeat(3, 2)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "4.png")
    Image.fromarray((ramp**2 / 255).astype(np.uint8)).save(tmp_path / "5.png")  # grey grows everywhere here too
    paths = [tmp_path / name for name in ("0.png", "1.jpg", "2.jpg", "3.png", "4.png", "5.png")]
    files = [ImageFile(path, False) for path in paths]
    prints = [fingerprint(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    assert prints[4].bits == prints[5].bits == 2**64 - 1
    assert near_duplicates.copies(files, prints) == [[0, 1, 2]]
    assert near_duplicates.copies(files[4:6], [prints[0]] * 2) == []  # by their pixels, whatever their fingerprints
    monkeypatch.setattr(near_duplicates, "_compared", lambda _: None)
    assert near_duplicates.copies(files, prints) == []


def test_no_pictures_have_no_copies():
    assert near_duplicates.copies([], []) == []
