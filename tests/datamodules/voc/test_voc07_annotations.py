"""All of VOC2007's annotations through the cache, against counts of the same files as text."""

import re
import time
from collections import Counter
from pathlib import Path

import pytest

from datamodules.ground_truth import read_ground_truth
from datamodules.voc.annotation_cache import AnnotationCache
from datamodules.voc.format import Annotation
from datamodules.voc.names import annotated_names
from datamodules.voc.reader import VOCFormat
from detector import VOC_CLASSES

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def devkit(genuine_voc) -> Path:
    return genuine_voc("voc2007-annotations.tar.xz")


def test_every_file_is_read_and_counts_are_those_of_the_text(devkit, tmp_path):
    voc = devkit / "VOC2007"
    texts = {path.stem: path.read_text() for path in (voc / "Annotations").glob("*.xml")}
    assert len(texts) == 9963
    objects = {stem: re.findall(r"<object>(.*?)</object>", text, re.DOTALL) for stem, text in texts.items()}
    stems = annotated_names(voc)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        found = AnnotationCache(voc, tmp_path).annotations(stems)
        seconds.append(time.process_time() - start)
    print("seconds of this process, first and cached:", seconds)
    assert list(found) == sorted(texts)
    assert all(isinstance(annotation, Annotation) for annotation in found.values())
    assert {stem: len(annotation.objects) for stem, annotation in found.items()} == {
        stem: len(parts) for stem, parts in objects.items()
    }
    flat = [part for parts in objects.values() for part in parts]
    items = [item for annotation in found.values() for item in annotation.objects]
    assert (len(items), sum(item.difficult for item in items)) == (30638, sum("<difficult>1" in part for part in flat))
    names = Counter(re.search(r"<name>(\w+)</name>", part)[1] for part in flat)
    assert Counter(item.name for item in items) == names
    assert set(names) == set(VOC_CLASSES)
    for stem, annotation in found.items():
        width, height = (int(re.search(rf"<{key}>(\d+)<", texts[stem])[1]) for key in ("width", "height"))
        assert (annotation.width, annotation.height) == (width, height)
        for item, part in zip(annotation.objects, objects[stem], strict=True):
            x1, y1, x2, y2 = (int(re.search(rf"<{key}>(\d+)<", part)[1]) for key in ("xmin", "ymin", "xmax", "ymax"))
            assert item.box == (x1 - 1, y1 - 1, x2, y2)


def test_splits(devkit):
    """15,662 objects in trainval, 12,608 of them not difficult; 14,976 in test, 2,945 of them difficult."""
    for split, images, objects, difficult in (("trainval", 5011, 15662, 15662 - 12608), ("test", 4952, 14976, 2945)):
        truth = read_ground_truth(VOCFormat(devkit), [f"2007_{split}"])
        assert (len(truth.image_names), len(truth.objects)) == (images, objects)
        assert truth.objects.difficult.sum() == difficult
