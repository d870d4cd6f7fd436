from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.ground_truth import read_ground_truth
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import Annotation, VOCObject, write_annotation
from datamodules.voc.reader import VOCFormat
from detector import VOC_CLASSES
from detector.errors import InputError


def annotate(folder: Path, stem: str, *objects: VOCObject, size: tuple[int, int] = (100, 80)) -> None:
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    write_annotation(Annotation(f"{stem}.jpg", *size, objects), folder / "Annotations" / f"{stem}.xml")


def list_split(folder: Path, name: str, *stems: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Splits val (b, a, c) and rest (d), of classes that are not all in each; no images."""
    folder = tmp_path / "plain"
    annotate(folder, "a", VOCObject("dog", (5.0, 6.0, 50.0, 60.0), difficult=True))
    annotate(folder, "b", VOCObject("cat", (0.0, 0.0, 120.0, 90.0)), VOCObject("dog", (1.0, 2.0, 3.0, 4.0)))
    annotate(folder, "c")
    annotate(folder, "d", VOCObject("bird", (0.0, 0.0, 9.0, 9.0)))
    list_split(folder, "val", "b", "a", "c")
    list_split(folder, "rest", "d")
    return folder


def test_objects_of_a_split_without_images(plain: Path) -> None:
    truth = read_ground_truth(VOCFormat(plain), ["val"])
    assert truth.image_names == ("b", "a", "c")
    assert truth.image_ids.tolist() == [0, 1, 2]
    assert truth.class_names == ("bird", "cat", "dog")  # of all annotations, so that numbers do not depend on the split
    assert truth.objects.image_id.tolist() == [0, 0, 1]
    assert truth.objects.label.tolist() == [2, 3, 3]
    assert truth.objects.box.tolist() == [[0, 0, 100, 80], [1, 2, 3, 4], [5, 6, 50, 60]]  # clipped to the stated size
    assert truth.objects.difficult.tolist() == [False, False, True]
    assert truth.sizes.tolist() == [[80, 100]] * 3  # height, width
    both = read_ground_truth(VOCFormat(plain), ["rest", "val"], ["dog", "cat", "bird"])
    assert both.objects.label.tolist() == [3, 2, 1, 1]


def test_same_as_the_data_module_where_images_are_there(plain: Path) -> None:
    (plain / "JPEGImages").mkdir()
    for stem, size in (("a", (40, 30)), ("b", (110, 85)), ("c", (9, 9)), ("d", (20, 20))):  # not as stated
        Image.new("RGB", size).save(plain / "JPEGImages" / f"{stem}.png")
    data = VOCDataModule(str(plain), ["rest"], ["val"], num_workers=0)
    truth = read_ground_truth(VOCFormat(plain), ["val"])
    assert list(truth.class_names) == data.class_names
    assert truth.sizes.tolist() == [[85, 110], [30, 40], [9, 9]]
    for image in range(3):
        target, rows = data.val_dataset.target(image), truth.objects.image_id == image
        np.testing.assert_array_equal(target["boxes"].numpy(), truth.objects.box[rows])
        assert target["labels"].tolist() == truth.objects.label[rows].tolist()
        assert target["difficult"].tolist() == truth.objects.difficult[rows].tolist()


def test_years(tmp_path: Path) -> None:
    for year, stem in (("2007", "000001"), ("2012", "2008_000001")):
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        annotate(folder, stem, VOCObject("sofa", (0.0, 0.0, 9.0, 9.0)))
        list_split(folder, "test", stem)
    truth = read_ground_truth(VOCFormat(tmp_path), ["2012_test", "2007_test"])
    assert truth.image_names == ("2008_000001", "000001")
    assert truth.class_names == VOC_CLASSES
    assert truth.objects.label.tolist() == [18, 18]


def test_image_name_in_two_years_is_refused(tmp_path: Path) -> None:
    for year in ("2007", "2012"):
        annotate(tmp_path / f"VOC{year}", "000001")
        list_split(tmp_path / f"VOC{year}", "test", "000001")
    with pytest.raises(
        InputError, match=r"2007_test, 2012_test.*image 1 has the name 000001, which image 0 .* 1 names"
    ):
        read_ground_truth(VOCFormat(tmp_path), ["2007_test", "2012_test"])


def test_what_is_wrong_is_named(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.xml: object 0 is of the class 'cat'.*dog \(and 1 more file"):
        annotate(plain, "a", VOCObject("bird", (0.0, 0.0, 9.0, 9.0)))
        read_ground_truth(VOCFormat(plain), ["val"], ["dog"])
    with pytest.raises(InputError, match=r"tset\.txt: no such split file"):
        read_ground_truth(VOCFormat(plain), ["tset"])
    with pytest.raises(InputError, match="no such folder"):
        read_ground_truth(VOCFormat(tmp_path / "nowhere"), ["val"])
    with pytest.raises(InputError, match="names a class twice"):
        read_ground_truth(VOCFormat(plain), ["val"], ["dog", "cat", "dog"])
    with pytest.raises(InputError, match="val_splits is empty"):
        read_ground_truth(VOCFormat(plain), [])
    annotate(plain, "c", size=(0, 0))
    with pytest.raises(InputError, match=r"c\.xml: states no image size"):
        read_ground_truth(VOCFormat(plain), ["val"])
