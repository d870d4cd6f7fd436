"""Folders and XML in VOC format as labelImg, CVAT, Roboflow and labelme leave them."""

import os
from pathlib import Path

import pytest

from datamodules.coco.reader import CocoFormat
from datamodules.doctor.examine import DoctorOptions, examine
from datamodules.ground_truth import read_ground_truth
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import VOCObject
from datamodules.voc.layout import ImageFinder
from datamodules.voc.reader import VOCFormat
from detector.errors import InputError

LAYOUTS = {  # images, annotations, both with the split as {}
    "images and annotations": ("images/{}", "annotations/{}"),
    "Oxford's pets": ("images/{}", "annotations/xmls/{}"),
    "labelImg in one folder": ("{}", "{}"),
    "Roboflow": ("{}", "{}"),
    "folders within splits": ("{}/images", "{}/annotations"),
    "capitals within splits": ("{}/JPEGImages", "{}/Annotations"),
    "images elsewhere": ("{}", "annotations/{}"),
    "with VOC's names": ("JPEGImages/{}", "Annotations/{}"),
}
SPLITTED = [name for name in LAYOUTS if name not in ("Oxford's pets", "labelImg in one folder")]


@pytest.fixture
def laid_out(tmp_path, write_image, annotate):
    """`laid_out(layout, splits)`: cat0, cat1 ... of train, valid and test, one cat in each, ever further right."""

    def write(layout: str, splits: tuple[str, ...]) -> Path:
        pictures, xmls = LAYOUTS[layout]
        for number in range(6):
            split = splits[min(number // 2, len(splits) - 1)]
            image = write_image(tmp_path / "made", f"cat{number}.jpg")
            xml = annotate(tmp_path / "made", f"cat{number}", VOCObject("cat", (number, 3, number + 6, 9)))
            for made, place in ((image, pictures), (xml, xmls)):
                target = tmp_path / "data" / place.format(split) / made.name
                target.parent.mkdir(parents=True, exist_ok=True)
                made.rename(target)
        return tmp_path / "data"

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dataset_without_splits(laid_out, layout):
    root = laid_out(layout, (".",))
    format = VOCFormat(root)
    assert format.offered() == [] and CocoFormat(root).offered() is None
    members = format.list_others([], look=True)
    assert [member.name for member in members] == [f"cat{number}" for number in range(6)]
    records = format.read(members, ["cat"])
    assert [record.name for record in records] == [f"cat{number}.jpg" for number in range(6)]
    assert [record.objects[0].box for record in records] == [(number, 3, number + 6, 9) for number in range(6)]
    assert all(record.usable and not record.problems for record in records)
    data = VOCDataModule(str(root), val_fraction=0.5, num_workers=0)
    data.setup("fit")
    assert (data.class_names, len(data.train_dataset), len(data.val_dataset)) == (["cat"], 3, 3)


@pytest.mark.parametrize("layout", SPLITTED)
def test_folders_are_splits(laid_out, layout):
    root = laid_out(layout, ("train", "valid", "test"))
    assert VOCFormat(root).offered() == ["test", "train", "valid"]
    data = VOCDataModule(str(root), ["train"], ["valid"], ["test"], num_workers=0)
    data.setup()
    assert data.train_dataset.file_names == ["train/cat0.jpg", "train/cat1.jpg"]
    assert data.val_dataset[1][1]["boxes"].tolist() == [[3, 3, 9, 9]]
    assert read_ground_truth(VOCFormat(root), ["test"]).image_names == ("test/cat4", "test/cat5")
    report = examine(DoctorOptions(VOCFormat(root)))
    assert report.problems == [] and report.splits == {"test": 2, "train": 2, "valid": 2}
    with pytest.raises(InputError, match=r"test_splits \(there is test\), or score the validation splits by frcnn val"):
        VOCDataModule(str(root), ["train"], ["valid"], num_workers=0).setup("test")
    with pytest.raises(
        InputError, match=r"is empty; name at least one split \(there are test, train, valid\), or have"
    ):
        read_ground_truth(VOCFormat(root), [])
    with pytest.raises(InputError, match=r"data: has no split 'val'; its folders are test, train, valid"):
        VOCDataModule(str(root), ["train"], ["val"], class_names=["cat"], num_workers=0).setup()


def test_missing_files_are_named_where_they_should_be(laid_out):
    root = laid_out("Roboflow", ("train", "valid"))
    (root / "train" / "cat0.jpg").unlink()
    (root / "valid" / "cat2.xml").unlink()
    report = examine(DoctorOptions(VOCFormat(root)))
    found = {(problem.kind, Path(problem.file).relative_to(root).as_posix()) for problem in report.problems}
    assert found == {
        ("missing_image", "train/cat0.jpg"),
        ("missing_annotation", "valid/cat2.xml"),
        ("not_in_split", "valid/cat2.jpg"),
    }


def test_images_of_many_suffixes_after_one_that_is_missing(tmp_path):
    """Among them a folder that is named as an image would be, and names that differ by their suffix alone."""
    for name in ("b.PNG", "c.tif", "c.jpg", "d.Jpg", "sub/e.png"):
        (tmp_path / "JPEGImages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "JPEGImages" / name).touch()
    (tmp_path / "JPEGImages" / "f.png").mkdir()
    (tmp_path / "Annotations").mkdir()
    finder = ImageFinder(tmp_path)
    for missing in ("a", "f", "sub/b", "nowhere/a"):
        with pytest.raises(InputError, match=rf"JPEGImages/{missing}\.jpg: no such image \(nor \.jpeg or \.png\)"):
            finder.find(missing)
    found = [finder.find(stem).relative_to(tmp_path / "JPEGImages").as_posix() for stem in ("b", "c", "d", "sub/e")]
    assert found == ["b.PNG", "c.jpg", "d.Jpg", "sub/e.png"]


def test_a_folder_that_cannot_be_listed_holds_what_it_may(tmp_path, monkeypatch):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "b.PNG").touch()
    monkeypatch.setattr("os.listdir", lambda folder: (_ for _ in ()).throw(PermissionError(folder)))
    assert ImageFinder(tmp_path).find("b").name == "b.PNG"


@pytest.mark.parametrize("images", ["JPEGImages", "nowhere"])
def test_where_all_images_are_missing_none_is_asked_for_by_every_suffix(tmp_path, annotate, monkeypatch, images):
    (tmp_path / images).mkdir()
    for number in range(40):
        annotate(tmp_path, f"cat{number}", VOCObject("cat", (2, 3, 8, 9)))
    asked: list[str] = []
    original = os.path.isfile
    monkeypatch.setattr("os.path.isfile", lambda path: asked.append(str(path)) or original(path))
    format = VOCFormat(tmp_path)
    records = format.read(format.list_others([], look=True), ["cat"])
    assert [problem.kind for record in records for problem in record.problems] == ["missing_image"] * 40
    assert sum("cat" in path for path in asked) < 3 * 40


def test_a_folder_is_listed_once_however_splits_mix_the_years(tmp_path, annotate, monkeypatch):
    for year in (2007, 2012):
        (tmp_path / f"VOC{year}" / "JPEGImages").mkdir(parents=True)
        for number in range(3):
            annotate(tmp_path / f"VOC{year}", f"cat{number}", VOCObject("cat", (2, 3, 8, 9)))
    format = VOCFormat(tmp_path)
    mixed = sorted(format.list_others([], look=True), key=lambda member: (member.stem, member.folder))
    listed: list[str] = []
    original = os.listdir
    monkeypatch.setattr("os.listdir", lambda folder=".": listed.append(str(folder)) or original(folder))
    records = format.read(mixed, ["cat"])
    assert [problem.kind for record in records for problem in record.problems] == ["missing_image"] * 6
    assert sorted(name for name in listed if "JPEG" in name) == [
        str(tmp_path / f"VOC{year}" / "JPEGImages") for year in (2007, 2012)
    ]


def test_other_xml_makes_no_dataset(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "annotations.xml").write_text(
        "<?xml version='1.0'?>\n<annotations><version>1.1</version></annotations>"
    )
    assert VOCFormat(tmp_path).offered() is None
    with pytest.raises(InputError, match=r"holds neither VOC<year>/ nor JPEGImages/.* nor images beside XML files$"):
        VOCFormat(tmp_path).check_root()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(InputError, match=r"it looks like --data_format coco$"):
        VOCFormat(tmp_path).check_root()


OBJECT = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
TOOLS = {
    "labelImg": (
        '<annotation verified="yes"><folder>images</folder><filename>i</filename><path>C:\\images\\i.png</path>'
        "<source><database>Unknown</database></source><size><width>32</width><height>24</height><depth>3</depth></size>"
        "<segmented>0</segmented><object><name>cat</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>0</difficult>{OBJECT}</object></annotation>"
    ),
    "Roboflow": (
        "<annotation><folder></folder><filename>i.png</filename><path>i.jpg</path><source><database>roboflow.com"
        "</database></source><size><width>32</width><height>24</height><depth>3</depth></size><segmented>0</segmented>"
        "<object><name>cat</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult><occluded>0"
        "</occluded><bndbox><xmin>{}</xmin><xmax>{2}</xmax><ymin>{1}</ymin><ymax>{3}</ymax></bndbox></object>"
        "</annotation>"
    ).replace("{}", "{0}"),
    "CVAT": (
        "<annotation><folder/><filename>sub/i.jpg</filename><source><database>Unknown</database><annotation>Unknown"
        "</annotation><image>Unknown</image></source><size><width>32</width><height>24</height><depth/></size>"
        "<segmented>0</segmented><object><name>cat</name><occluded>0</occluded>"
        f"{OBJECT}<attributes><attribute><name>colour</name><value>red</value></attribute></attributes></object>"
        "</annotation>"
    ),
    "labelme": (
        "<annotation><folder/><filename>i.jpg</filename><database/><annotation/><image/><size><height>24</height><width>"
        "32</width><depth>3</depth></size><segmented/><object><name>cat</name><pose/><truncated/><difficult/>"
        f"{OBJECT}</object></annotation>"
    ),
    "without a word": (
        "<annotation><object><name>cat</name><pose>Unspecified</pose><truncated>Unspecified</truncated>"
        f"<difficult>Unspecified</difficult>{OBJECT}</object></annotation>"
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_xml_of_tools(tmp_path, write_image, tool):
    write_image(tmp_path, "i.jpg").rename(tmp_path / "i.jpg")
    (tmp_path / "JPEGImages").rmdir()
    (tmp_path / "i.xml").write_text(TOOLS[tool].format(3.5, 4, 12.25, 9))
    format = VOCFormat(tmp_path)
    (record,) = format.read(format.list_others([], look=True), ["cat"])
    (item,) = record.objects
    assert (item.name, item.box, item.difficult) == ("cat", (2.5, 3, 12.25, 9), False)
    assert (record.size, list(record.problems)) == ((32, 24), [])
