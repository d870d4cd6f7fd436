"""One dataset in both formats: the four commands that read annotations say the same of both, to the digit."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ONLY_XML = {"file_name_mismatch", "missing_annotation", "unreadable_annotation"}


def write_coco(voc: Path, split: str, names: list[str], folder: Path) -> None:
    """Write a split as COCO JSON, of the numbers in the XML files, under ids with gaps."""
    images, annotations = [], []
    stems = (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    for number, stem in enumerate(stems, start={"train": 7, "val": 107, "test": 207}[split]):
        root = ElementTree.parse(voc / "Annotations" / f"{stem}.xml").getroot()
        sides = {key: int(root.findtext(f"size/{key}") or 0) for key in ("width", "height")}
        images.append({"id": 10 * number, "file_name": f"{stem}.jpg"} | {k: v for k, v in sides.items() if v})
        for node in root.iter("object"):
            category = 3 * names.index(node.findtext("name") or "") + 5
            entry = {"id": len(annotations), "image_id": 10 * number, "category_id": category}
            entry["iscrowd"] = int(node.findtext("difficult") or 0)
            if node.findtext("bndbox/xmin"):
                x1, y1, x2, y2 = (int(node.findtext(f"bndbox/{k}") or 0) for k in ("xmin", "ymin", "xmax", "ymax"))
                entry["bbox"] = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            annotations.append(entry)
    categories = [{"id": 3 * index + 5, "name": name} for index, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(content))


def names_in(voc: Path) -> list[str]:
    files = [ElementTree.parse(path) for path in (voc / "Annotations").glob("*.xml")]
    return sorted({node.findtext("name") or "" for file in files for node in file.getroot().iter("object")})


@pytest.fixture(scope="module")
def both(mini_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """MiniVOC, a third of its objects difficult and two of its images of other sizes, in VOC format and in COCO's."""
    voc = Path(shutil.copytree(mini_voc, tmp_path_factory.mktemp("both") / "voc"))
    for number, path in enumerate(sorted((voc / "Annotations").iterdir())):
        tree = ElementTree.parse(path)
        for index, node in enumerate(tree.getroot().iter("object")):
            flag = node.find("difficult")
            assert flag is not None
            flag.text = str(int((number + index) % 3 == 0))
        if number < 2:
            image = voc / "JPEGImages" / f"{path.stem}.jpg"
            with Image.open(image) as picture:
                wider = picture.resize((picture.width + 40 * (1 + number), picture.height + 25))
            wider.save(image)
            for key, value in (("width", wider.width), ("height", wider.height)):
                side = tree.find(f"size/{key}")
                assert side is not None
                side.text = str(value)
        tree.write(path)
    for split in ("train", "val", "test"):
        write_coco(voc, split, names_in(voc), voc.parent / "coco")
    (voc.parent / "coco" / "images").symlink_to(voc / "JPEGImages")
    return voc, voc.parent / "coco"


@pytest.fixture
def said(frcnn, tmp_path):
    """`said(command, ...)`: the JSON document of a command."""

    def run(*arguments: object) -> dict[str, Any]:
        result = frcnn(*arguments, "--format", "json", cwd=tmp_path)
        assert (result.code, result.err) == (0, "")
        document: dict[str, Any] = json.loads(result.out)
        return document

    return run


def results_of(coco: Path, split: str, by_name: bool) -> list[dict[str, Any]]:
    """Detections near objects, some of a wrong class, by names or by the ids of the file."""
    content = json.loads((coco / f"{split}.json").read_text())
    file_names = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    rng = np.random.default_rng(3)
    found = []
    for index, entry in enumerate(content["annotations"]):
        box = (np.array(entry["bbox"]) + rng.normal(0, 2, 4) * (1, 1, 0, 0)).round(2).tolist()
        category = entry["category_id"] if index % 5 else min(names)
        where = {"file_name": file_names[entry["image_id"]], "category_name": names[category]}
        ids = {"image_id": entry["image_id"], "category_id": category}
        found.append((where if by_name else ids) | {"bbox": box, "score": round(float(rng.random()), 3)})
    return found


def test_evaluate(both, said, tmp_path):
    voc, coco = both
    found = tmp_path / "found.json"
    options = ("--data.val_splits", "[val, train]", "--bootstrap", 20, "--breakdown", "--proposals", found)
    found.write_text(json.dumps(results_of(coco, "val", True) + results_of(coco, "train", True)))
    expected = said("evaluate", found, "--data.root", voc, *options)
    assert expected["images"] == 16 and 0 < expected["AP50_voc"] < 1 and expected["difficult"] > 5
    assert said("evaluate", found, "--data.root", coco, "--data_format", "coco", *options) == expected


def test_evaluate_by_the_ids_of_the_file_without_images(both, said, tmp_path):
    voc, coco = both
    found = tmp_path / "found.json"
    (tmp_path / "bare").mkdir()
    shutil.copy(coco / "val.json", tmp_path / "bare")
    documents = []
    for by_name, root, data_format in ((True, voc, "voc"), (False, tmp_path / "bare", "coco")):
        found.write_text(json.dumps(results_of(coco, "val", by_name)))
        options = ("--data.root", root, "--data.val_splits", "[val]", "--data_format", data_format)
        documents.append(said("evaluate", found, *options))
    assert documents[0] == documents[1] and documents[0]["AP50"] > 0


def test_unknown_ids_are_refused(both, frcnn, tmp_path):
    _, coco = both
    found = tmp_path / "found.json"
    for key, words in (("image_id", "is of image 1, which is not in val"), ("category_id", "or the numbers 5, 8")):
        entry = results_of(coco, "val", False)[0] | {key: 1}
        found.write_text(json.dumps([entry]))
        options = ("--data.root", coco, "--data.val_splits", "[val]", "--data_format", "coco")
        result = frcnn("evaluate", found, *options, cwd=tmp_path)
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1


def test_anchors(both, said, tiny_config):
    voc, coco = both
    options = ("anchors", "--config", tiny_config, "--suggest", 2, "--data.root")
    expected = said(*options, voc)
    assert expected["images"] == 12 and expected["difficult_objects"] > 3
    assert said(*options, coco, "--data_format", "coco") == expected


def test_show_data(both, frcnn, tiny_config, tmp_path):
    sheets, lines = [], []
    for data_format, root in zip(("voc", "coco"), both, strict=True):
        options = ("--output", data_format, "--images", 4, "--epochs", 2, "--data.val_splits", "[val]")
        more = ("--data.root", root, "--data_format", data_format, "--data.augmentation", "ssd_crop")
        result = frcnn("show-data", "--config", tiny_config, *options, *more, cwd=tmp_path)
        assert (result.code, result.err) == (0, "")
        lines.append(result.out.partition(": ")[2])
        sheets.append(np.array(Image.open(tmp_path / data_format / "ssd_crop.png")))
    assert lines[0] == lines[1] != ""
    np.testing.assert_array_equal(*sheets)


def test_doctor_on_a_healthy_dataset(both, said):
    voc, coco = both
    (voc / "ImageSets" / "Main" / "trainval.txt").unlink(missing_ok=True)
    (voc / "ImageSets" / "Main" / "odd.txt").unlink(missing_ok=True)
    expected, found = said("doctor", voc), said("doctor", coco, "--data_format", "coco")
    assert expected["problems"] == [] and expected["splits"] == {"test": 4, "train": 12, "val": 4}
    assert {**found, "dataset": None} == {**expected, "dataset": None}


def test_doctor_on_a_broken_one(broken_dataset, frcnn, tmp_path):
    """All faults that both formats can have, in the splits train and val."""
    voc = Path(shutil.copytree(broken_dataset.root, tmp_path / "voc"))
    split = voc / "ImageSets" / "Main" / "train.txt"
    stems = split.read_text().split()
    for stem in stems[3], stems[4], "zz_nothere":  # of whose annotations nothing can be written down
        stems.remove(stem)
    split.write_text("\n".join(stems))
    for path in list((voc / "Annotations").iterdir()):
        if path.stem not in {*stems, *(voc / "ImageSets" / "Main" / "val.txt").read_text().split()}:
            path.unlink()
    for name in ("train", "val"):
        write_coco(voc, name, names_in(voc), tmp_path / "coco")
    (tmp_path / "coco" / "images").symlink_to(voc / "JPEGImages")
    known = ("--data.class_names", f"[{', '.join(broken_dataset.class_names)}]")
    documents = []
    for root, data_format in ((voc, "voc"), (tmp_path / "coco", "coco")):
        options = ("--data.train_splits", "[train]", "--data.val_splits", "[val]", "--data_format", data_format)
        result = frcnn("doctor", root, *options, *known, "--format", "json", cwd=tmp_path)
        assert (result.code, result.err) == (1, "")
        document = json.loads(result.out)
        problems = [one for one in document.pop("problems") if one["kind"] not in ONLY_XML]
        document["kinds"] = {kind: count for kind, count in document["kinds"].items() if kind not in ONLY_XML}
        document["effects"] = sorted((one["kind"], one["effect"], one["object"] is None) for one in problems)
        assert all(one["file"] in one["message"] for one in problems)
        documents.append({key: value for key, value in document.items() if key != "dataset"})
    voc_document, coco_document = documents
    assert len(voc_document["kinds"]) == 17 and voc_document["breaks_training"] == 9, voc_document["kinds"]
    for key, value in voc_document.items():
        assert coco_document[key] == value, key
