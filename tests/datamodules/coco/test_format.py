import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.coco.format import CocoFile, read_coco
from datamodules.dataset_format import ObjectRecord, Stated
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
    assert [(one.name, one.id) for one in file.categories] == [("cat", 3), ("dog", 18), ("unused", 90)]  # by id
    assert list(file.images) == ["a b.jpg", "sub/b.png", "empty.jpg"]
    expected = [ObjectRecord(1, "cat", (0, 0, 64, 48), True)]
    assert file.images["a b.jpg"] == Stated(
        file.path, "annotations[{}]", (64, 48), expected, image="a b.jpg", result_id=40
    )
    assert file.images["sub/b.png"].objects == [
        ObjectRecord(0, "dog", (1.5, 2, 11.75, 22), False),
        ObjectRecord(2, "cat", (-4, 0, 1, 1), False),
    ]
    assert (file.images["sub/b.png"].size, file.images["empty.jpg"].objects) == ((0, 0), [])


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
        (changed("images", to=[]), ["list of images is empty"]),
        (changed("categories", 2, "name", to="cat"), ["categories 3 and 90 repeat the name 'cat'"]),
        (changed("categories", 2, "name", to=None), ["categories[2] has name None"]),
        (changed("categories", 2, "id", to=3), ["categories[2] repeats the id", "3"]),
        (changed("categories", 2, "id", to=None), ["categories[2] has id None", "a whole number or a text"]),
    ],
)
def test_bad_files_are_named_with_the_entry_in_one_line(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_coco(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message and len(message) < len(str(path)) + 250


OBJECT = {"id": 9, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}


def with_object(**values: Any) -> dict[str, Any]:
    content = document()
    entry = {key: value for key, value in (OBJECT | values).items() if value is not KeyError}
    content["annotations"].append(entry)
    return content


def all_problems(file: CocoFile) -> list[tuple[int | None, str, str]]:
    found = [(one.object, one.kind, one.message) for image in file.images.values() for one in image.problems]
    return sorted(found, key=lambda one: -1 if one[0] is None else one[0])


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"image_id": 41}, "incomplete_object", "has image_id 41, which none of images has"),
        ({"image_id": None}, "incomplete_object", "has image_id None; a whole number or a text is needed"),
        ({"category_id": 4}, "unknown_class", "has category_id 4, which none of categories has"),
        ({"category_id": [3]}, "incomplete_object", "has category_id [3]"),
        ({"bbox": KeyError}, "incomplete_object", "has bbox None; four finite numbers x, y, width, height are needed"),
        ({"bbox": []}, "incomplete_object", "has bbox []; four finite numbers"),
        ({"bbox": [1, 2, 3]}, "incomplete_object", "has bbox [1, 2, 3]; four"),
        ({"bbox": [1, 2, float("nan"), 3]}, "incomplete_object", "has bbox [1, 2, nan, 3]"),
        ({"bbox": ["1", "2", "wide", "3"]}, "incomplete_object", "has bbox ['1', '2', 'wide', '3']"),
        ({"bbox": [1, 2, 10**400, 3]}, "incomplete_object", "four finite numbers"),
        ({"bbox": [True, 2, 3, 4]}, "incomplete_object", "four finite numbers"),
        ({"bbox": [296.65, 388.33, 1.03, 0.0]}, "negative_box", "width and height must be positive"),
        ({"bbox": [9, 9, -3, 4]}, "negative_box", "width and height must be positive"),
        ({"bbox": [], "segmentation": {"counts": [1], "size": [4, 4]}}, "incomplete_object", "has bbox []"),
        ({"bbox": [], "segmentation": [[1, 1, 5, 1, 9, 1]]}, "incomplete_object", "has bbox []"),  # a line
        ({"bbox": [], "segmentation": [[1, 1, 5, 5]]}, "incomplete_object", "has bbox []"),
        ({"iscrowd": "yes"}, "incomplete_object", "has iscrowd 'yes'; 0 or 1 is needed"),
        ({"iscrowd": 2}, "incomplete_object", "has iscrowd 2"),
    ],
)
def test_bad_objects_are_problems_of_their_own(tmp_path, values, kind, words):
    path = write(tmp_path, with_object(**values))
    file = read_coco(path)
    ((index, found, message),) = all_problems(file)
    assert (index, found) == (3, kind)
    assert message.startswith(f"{path}: annotations[3] has ") and words in message, message
    assert "\n" not in message and len(message) < len(str(path)) + 150
    boxes = [[item.box for item in image.objects or ()] for image in file.images.values()]
    assert [sum(box is not None for box in ones) for ones in boxes] == [1, 2, 0]  # the others


def test_an_entry_that_is_no_object(tmp_path):
    content = document()
    content["annotations"][1] = None
    ((index, kind, message),) = all_problems(read_coco(write(tmp_path, content)))
    assert (index, kind) == (1, "incomplete_object") and "annotations[1] is None; a JSON object" in message


@pytest.mark.parametrize(
    ("content", "words", "unusable"),
    [
        (changed("images", 1, to=5), ["images[1] is 5"], {"instances.json: images[1]"}),
        (
            changed("images", 1, "file_name", to=KeyError),
            ["images[1] has file_name None"],
            {"instances.json: images[1]"},
        ),
        (changed("images", 0, "width", to=-3), ["images[0] has width -3"], {"instances.json: images[0]"}),
        (changed("images", 0, "width", to="wide"), ["images[0] has width 'wide'"], {"instances.json: images[0]"}),
        (changed("images", 1, "file_name", to="a b.jpg"), ["images[1] repeats", "7, 'a b.jpg'"], {"a b.jpg"}),
        (changed("images", 1, "id", to=40), ["images[1] repeats", "40, 'sub/b.png'"], {"a b.jpg", "sub/b.png"}),
    ],
)
def test_bad_images_are_problems_of_their_own(tmp_path, content, words, unusable):
    """What is not known to be of one image is of none; objects of such images say nothing more."""
    file = read_coco(write(tmp_path, content))
    assert {name for name, image in file.images.items() if image.objects is None} == unusable
    found = all_problems(file)
    assert found[0][0] is None and all(word in found[0][2] for word in words), found
    lost = not any(image.result_id == 7 for image in file.images.values()) and "a b.jpg" not in words[-1]
    assert [index for index, *_ in found[1:]] == ([0, 2] if lost else [])  # then its two objects are of no image


def test_an_image_that_is_listed_twice_alike_is_used_once(tmp_path):
    content = document()
    content["images"].append(content["images"][0])
    file = read_coco(write(tmp_path, content))
    assert list(file.images) == ["a b.jpg", "sub/b.png", "empty.jpg"]
    ((index, kind, message),) = all_problems(file)
    assert (index, kind) == (None, "named_twice") and "images[3] repeats" in message
    assert len(file.images["a b.jpg"].objects) == 1


def test_what_can_mean_one_thing_only_is_read(tmp_path):
    content = document()
    content["images"][0] |= {"id": "40", "width": "64", "height": 48.0}
    content["images"][1]["id"] = "7f9c-4b"
    content["categories"] = [{"id": "18", "name": "dog"}, {"id": "3", "name": 5}, {"id": "x", "name": "unused"}]
    content["annotations"] = [
        {"image_id": 40, "category_id": 18.0, "bbox": ["0", " 1.5", "1e1", 20.25], "iscrowd": "1"},
        {"image_id": "7f9c-4b", "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": True},
        {"image_id": "040", "category_id": "03", "bbox": [1, 2, 3, 4], "iscrowd": 0.0},
        {"image_id": 8.0, "category_id": "x", "bbox": [1, 2, 3, 4], "iscrowd": None},
    ]
    file = read_coco(write(tmp_path, content))
    assert all_problems(file) == []
    assert [(one.id, one.name) for one in file.categories] == [("3", "5"), ("18", "dog"), ("x", "unused")]  # 3 < 18
    first, second, third = file.images.values()
    assert (first.result_id, first.size) == ("40", (64, 48))  # ids as they are written
    assert first.objects == [
        ObjectRecord(0, "dog", (0, 1.5, 10, 21.75), True),
        ObjectRecord(2, "5", (1, 2, 4, 6), False),
    ]
    assert second.objects == [ObjectRecord(1, "5", (1, 2, 4, 6), True)]
    assert third.objects == [ObjectRecord(3, "unused", (1, 2, 4, 6), False)]
    assert [note.partition(": ")[2] for note in file.notes] == ["1 annotations with iscrowd null are read as with 0"]


def test_ids_that_differ_only_in_spelling_stay_apart_where_the_file_needs_both(tmp_path):
    content = document()
    content["images"][0]["id"], content["images"][1]["id"] = "7", 7
    content["annotations"] = [OBJECT | {"image_id": "7"}, OBJECT | {"id": 10}, OBJECT | {"id": 11, "image_id": "07"}]
    file = read_coco(write(tmp_path, content))
    assert [[item.index for item in image.objects] for image in file.images.values()] == [[0], [1], []]
    assert [(index, "'07', which none of images has" in text) for index, _, text in all_problems(file)] == [(2, True)]


def test_without_bbox_the_polygons_have_one(tmp_path):
    square, triangle = [2, 3, 7.5, 3, 7.5, 9, 2, 9], [10, 1, 14, 8, 9, 4]
    content = with_object(bbox=KeyError, segmentation=[square])
    content["annotations"] += [
        OBJECT | {"id": 10, "bbox": [], "segmentation": [square, triangle]},
        OBJECT | {"id": 11, "bbox": None, "segmentation": [list(map(str, triangle))]},
        OBJECT | {"id": 12, "bbox": [1, 2, 3, 4], "segmentation": [square]},
    ]
    file = read_coco(write(tmp_path, content))
    assert [item.box for item in file.images["sub/b.png"].objects[2:]] == [
        *((2, 3, 7.5, 9), (2, 1, 14, 9), (9, 1, 14, 8), (1, 2, 4, 6)),
    ]
    assert file.notes == (f"{file.path}: 3 annotations without bbox have the box around their polygons",)


def test_repeated_ids_of_annotations_are_said(tmp_path):
    content = with_object(id=1)
    content["annotations"].append(OBJECT | {"id": 1, "bbox": [5, 5, 5, 5]})
    file = read_coco(write(tmp_path, content))
    assert [len(image.objects) for image in file.images.values()] == [1, 4, 0]
    (note,) = file.notes
    assert "2 annotations repeat the id of an earlier one" in note


@pytest.mark.parametrize("name", ["animals", "cat"])
def test_a_category_that_only_names_the_group_of_the_others_is_none(tmp_path, name):
    content = document()
    for category in content["categories"]:
        category["supercategory"] = name
    content["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})
    file = read_coco(write(tmp_path, content))
    assert [one.name for one in file.categories] == ["cat", "dog", "unused"]
    assert file.root is not None and (file.root.id, file.root.name) == (0, name)
    # With objects it is a class as any other,
    content["annotations"].append(OBJECT | {"category_id": 0})
    if name == "cat":
        with pytest.raises(InputError, match="categories 0 and 3 repeat the name 'cat'"):
            read_coco(write(tmp_path, content))
        return
    file = read_coco(write(tmp_path, content))
    assert [one.name for one in file.categories] == ["animals", "cat", "dog", "unused"] and file.root is None
    # and so it is if another category is of another group.
    del content["annotations"][-1]
    content["categories"][3]["supercategory"] = "things"
    assert read_coco(write(tmp_path, content)).root is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings(tmp_path, encoding):
    content = document()
    content["categories"][0]["name"] = "собака"
    path = tmp_path / "instances.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    if encoding == "utf-16-le":  # without a byte order mark
        with pytest.raises(InputError, match=r"cannot be read as text: .*save it as UTF-8"):
            read_coco(path)
    else:
        assert [one.name for one in read_coco(path).categories] == ["cat", "собака", "unused"]


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: no such annotation file"):
        read_coco(tmp_path / "gone.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.json: cannot be read as text"):
        read_coco(tmp_path / "bytes.json")
