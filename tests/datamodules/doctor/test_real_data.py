"""What frcnn doctor counts in genuine VOC data, against a count by regular expressions."""

import re
from collections import Counter

import pytest

from datamodules.doctor.examine import DoctorOptions, examine
from datamodules.voc.reader import VOCFormat
from detector import VOC_CLASSES

pytestmark = pytest.mark.real_data


def _independent_count(folder):
    """Objects and difficult objects by class."""
    objects: Counter[str] = Counter()
    difficult: Counter[str] = Counter()
    for path in folder.glob("*.xml"):
        for text in re.findall("<object>(.*?)</object>", path.read_text(), re.DOTALL):
            without_parts = re.sub("<part>.*?</part>", "", text, flags=re.DOTALL)
            (name,) = re.findall(r"<name>\s*(\w+)\s*</name>", without_parts)
            objects[name] += 1
            difficult[name] += re.findall(r"<difficult>\s*(\d)\s*</difficult>", without_parts) == ["1"]
    return objects, difficult


def _check_counts(report, objects, difficult):
    assert set(objects) == set(VOC_CLASSES)
    assert report.classes == dict(objects)
    assert report.difficult == {name: difficult[name] for name in objects}
    assert report.objects == objects.total() == len(report.boxes)


def test_all_annotations_of_voc2007(genuine_voc):
    devkit = genuine_voc("voc2007-annotations.tar.xz")
    report = examine(DoctorOptions(VOCFormat(devkit), images=False))
    _check_counts(report, *_independent_count(devkit / "VOC2007" / "Annotations"))
    assert (report.images, report.objects, sum(report.difficult.values())) == (9963, 30638, 5999)
    assert report.splits == {"2007_test": 4952, "2007_train": 2501, "2007_trainval": 5011, "2007_val": 2510}
    assert report.problems == []
    trainval = examine(DoctorOptions(VOCFormat(devkit), {"train": ["2007_trainval"]}, images=False))
    # As the dataset's authors state them (Everingham et al. 2010, table 2): with and without difficult objects.
    assert (trainval.images, trainval.objects, trainval.objects - sum(trainval.difficult.values())) == (
        *(5011, 15662, 12608),
    )


def test_voc2012_subset(genuine_voc):
    devkit = genuine_voc("voc2012-subset.tar")
    report = examine(DoctorOptions(VOCFormat(devkit)))
    _check_counts(report, *_independent_count(devkit / "VOC2012" / "Annotations"))
    assert (report.images, report.image_files, report.empty) == (964, 964, 0)
    assert report.problems == []  # no two of its pictures are taken for copies either
