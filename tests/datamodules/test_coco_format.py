import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.coco_format import CocoImage, CocoObject, read_coco
from detector.errors import InputError


def document() -> dict[str, Any]:
    return {
        "info": {},
        "images": [
            {"id": 40, "file_name": "a b.jpg", "width": 64, "height": 48},
            {"id": 7, "file_name": "sub\\b.png"},
            {"id": 8, "file_name": "empty.jpg", "width": 9, "height": 5},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "unused"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1.5, 2, 10.25, 20], "iscrowd": 0, "area": 9},
            {"id": 2, "image_id": 40, "category_id": 3, "bbox": [0, 0, 64, 48], "iscrowd": 1, "segmentation": {}},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [-4, 0, 5, 1]},
        ],
    }


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_images_with_their_objects(tmp_path):
    file = read_coco(write(tmp_path, document()))
    assert file.categories == ("cat", "dog", "unused")  # by id, not by place
    assert list(file.images) == ["a b.jpg", "sub/b.png", "empty.jpg"]
    assert file.images["a b.jpg"] == CocoImage("a b.jpg", 64, 48, [CocoObject(1, "cat", (0, 0, 64, 48), True)])
    assert file.images["sub/b.png"].objects == [
        CocoObject(0, "dog", (1.5, 2, 11.75, 22), False),
        CocoObject(2, "cat", (-4, 0, 1, 1), False),
    ]
    assert (file.images["sub/b.png"].width, file.images["empty.jpg"].objects) == (0, [])


def changed(*keys: Any, to: Any) -> dict[str, Any]:
    content: Any = document()
    place = content
    for key in keys[:-1]:
        place = place[key]
    if to is KeyError:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no whole JSON document", "character 0 of 0", "cut short"]),
        (json.dumps(document())[:-40], ["no whole JSON document", "cut short"]),
        ("[" * 100_000, ["nested too deep"]),
        ('{"images": ' + "1" * 5000 + "}", ["too large a number"]),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], ["a JSON list", "COCO results"]),
        ("17", ["is 17", "JSON object"]),
        (changed("annotations", to=KeyError), ["has no annotations"]),
        (changed("images", to={}), ["has {} as images"]),
        (changed("images", 1, to=5), ["images[1] is 5"]),
        (changed("images", 1, "file_name", to=KeyError), ["images[1] has file_name None"]),
        (changed("images", 1, "file_name", to="a b.jpg"), ["images[1] repeats", "a b.jpg"]),
        (changed("images", 1, "id", to=40), ["images[1] repeats", "40"]),
        (changed("images", 1, "id", to="7"), ["images[1] has id '7'", "whole number"]),
        (changed("images", 0, "width", to=-3), ["images[0] has width -3"]),
        (changed("categories", 2, "name", to="cat"), ["categories[2] repeats", "cat"]),
        (changed("categories", 2, "name", to=None), ["categories[2] has name None"]),
        (changed("annotations", 2, "image_id", to=41), ["annotations[2] has image_id 41", "none of images"]),
        (changed("annotations", 2, "category_id", to=4), ["annotations[2] has category_id 4", "none of categories"]),
        (changed("annotations", 2, "bbox", to=KeyError), ["annotations[2] has bbox None", "four finite numbers"]),
        (changed("annotations", 2, "bbox", to=[1, 2, 3]), ["annotations[2] has bbox [1, 2, 3]"]),
        (changed("annotations", 2, "bbox", to=[1, 2, float("nan"), 3]), ["annotations[2] has bbox", "nan"]),
        (changed("annotations", 2, "bbox", to=[1, 2, 10**400, 3]), ["annotations[2] has bbox", "four finite numbers"]),
        (changed("annotations", 2, "bbox", to=[1, 2, 0, 3]), ["annotations[2] has bbox", "must be positive"]),
        (changed("annotations", 2, "iscrowd", to="yes"), ["annotations[2] has iscrowd 'yes'"]),
    ],
)
def test_bad_files_are_named_with_the_entry_in_one_line(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_coco(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message and len(message) < len(str(path)) + 250


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: no such annotation file"):
        read_coco(tmp_path / "gone.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.json: cannot be read as text"):
        read_coco(tmp_path / "bytes.json")
