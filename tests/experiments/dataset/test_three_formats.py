"""One dataset in three formats and one of a user: training and other commands say the same of all, to the digit.

YOLO's labels have no word for difficult, so its dataset is compared to one without difficult objects.
"""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.voc.datamodule import VOCDataModule
from experiments.dataset.formats import data_module_of

CSV = "experiments.examples.csv_format.CsvFormat"
NOT_IN_ALL = {
    "coco": {"file_name_mismatch", "missing_annotation", "unreadable_annotation"},
    "yolo": {"file_name_mismatch", "missing_annotation", "unreadable_annotation", "size_mismatch", "unknown_size"},
}


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


def write_yolo(voc: Path, splits: Sequence[str], names: list[str], folder: Path) -> None:
    """Write label files, of the numbers in the XML files and the sizes of the images, and splits as lists of images."""
    (folder / "labels").mkdir(parents=True)
    (folder / "images").symlink_to(voc / "JPEGImages")
    (folder / "classes.txt").write_text("\n".join(names))
    for split in splits:
        stems = (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        (folder / f"{split}.txt").write_text("".join(f"./images/{stem}.jpg\n" for stem in stems))
        for stem in stems:
            root = ElementTree.parse(voc / "Annotations" / f"{stem}.xml").getroot()
            image, lines = voc / "JPEGImages" / f"{stem}.jpg", []
            width, height = (int(root.findtext(f"size/{key}") or 0) for key in ("width", "height"))
            with suppress(OSError), Image.open(image) as picture:
                width, height = picture.size
            for node in root.iter("object"):
                x1, y1, x2, y2 = (int(node.findtext(f"bndbox/{k}") or 0) for k in ("xmin", "ymin", "xmax", "ymax"))
                line = f"{names.index(node.findtext('name') or '')}"
                if node.findtext("bndbox/xmin"):
                    line += f" {(x1 - 1 + x2) / 2 / width!r} {(y1 - 1 + y2) / 2 / height!r}"
                    line += f" {(x2 - x1 + 1) / width!r} {(y2 - y1 + 1) / height!r}"
                lines.append(line)
            (folder / "labels" / f"{stem}.txt").write_text("\n".join(lines))


def write_csv(voc: Path, splits: Sequence[str], folder: Path) -> None:
    """Write a CSV file for each split, of the numbers in the XML files, and links to the images beside it."""
    folder.mkdir()
    for image in (voc / "JPEGImages").iterdir():
        (folder / image.name).symlink_to(image)
    for split in splits:
        lines = ["filename;xmin;ymin;xmax;ymax;class"]
        for stem in (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            for node in ElementTree.parse(voc / "Annotations" / f"{stem}.xml").getroot().iter("object"):
                x1, y1, x2, y2 = (int(node.findtext(f"bndbox/{k}") or 0) for k in ("xmin", "ymin", "xmax", "ymax"))
                lines.append(f"{stem}.jpg;{x1 - 1};{y1 - 1};{x2};{y2};{node.findtext('name')}")
        (folder / f"{split}.csv").write_text("\n".join(lines))


def names_in(voc: Path) -> list[str]:
    files = [ElementTree.parse(path) for path in (voc / "Annotations").glob("*.xml")]
    return sorted({node.findtext("name") or "" for file in files for node in file.getroot().iter("object")})


class Pair(NamedTuple):
    """A dataset in VOC format, and in another one."""

    voc: Path
    other: Path
    name: str

    @property
    def options(self) -> tuple[object, ...]:
        return "--data.root", self.other, *self.format

    @property
    def format(self) -> tuple[str, ...]:
        return "--data_format", *((CSV, "--data_format.delimiter", ";") if self.name == "csv" else (self.name,))


@pytest.fixture(scope="module", params=["coco", "yolo", "csv"])
def both(request: pytest.FixtureRequest, mini_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """MiniVOC, a third of its objects difficult where that can be said, and two of its images of other sizes."""
    voc = Path(shutil.copytree(mini_voc, tmp_path_factory.mktemp("both") / "voc"))
    for number, path in enumerate(sorted((voc / "Annotations").iterdir())):
        tree = ElementTree.parse(path)
        for index, node in enumerate(tree.getroot().iter("object")):
            flag = node.find("difficult")
            assert flag is not None
            flag.text = str(int((number + index) % 3 == 0 and request.param == "coco"))
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
    for name in ("trainval", "odd"):
        (voc / "ImageSets" / "Main" / f"{name}.txt").unlink(missing_ok=True)
    splits = ("train", "val", "test")
    for split in splits:
        write_coco(voc, split, names_in(voc), voc.parent / "coco")
    (voc.parent / "coco" / "images").symlink_to(voc / "JPEGImages")
    if request.param == "yolo":
        write_yolo(voc, splits, names_in(voc), voc.parent / "yolo")
    elif request.param == "csv":
        write_csv(voc, splits, voc.parent / "csv")
    return Pair(voc, voc.parent / request.param, request.param)


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


def test_the_first_batch_of_a_training(both, frcnn, tiny_config, tmp_path):
    batches = []
    csv = {"class_path": CSV, "init_args": {"delimiter": ";"}}
    other = data_module_of(csv if both.name == "csv" else both.name)
    for kind, root in ((VOCDataModule, both.voc), (other, both.other)):
        data = kind(str(root), ["train"], ["val"], augmentation="ssd_crop", batch_size=4, seed=3, num_workers=0)
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    (images, targets), (other_images, other_targets) = batches
    assert sum(len(target["boxes"]) for target in targets) > 4
    for image, target, other_image, other_target in zip(images, targets, other_images, other_targets, strict=True):
        assert torch.equal(image, other_image) and target["file_name"] == other_target["file_name"]
        for key in ("boxes", "labels", "difficult", "image_id"):
            assert torch.equal(target[key], other_target[key]), key
    documents = []
    for data_options in (("--data.root", both.voc), both.options):
        more = ("--trainer.max_steps", 1, "--data.val_splits", "[val]", "--run_name", len(documents))
        result = frcnn("fit", "--config", tiny_config, *data_options, *more, cwd=tmp_path)
        assert result.code == 0, result.err
        (path,) = tmp_path.glob(f"runs/*/{len(documents)}/metrics.json")
        document = json.loads(path.read_text())
        documents.append({key: value for key, value in document.items() if key.startswith(("train/loss", "val/"))})
    assert documents[0] == documents[1] and len(documents[0]) == 5


def test_evaluate(both, said, tmp_path):
    voc, coco = both.voc, both.voc.parent / "coco"
    found = tmp_path / "found.json"
    options = ("--data.val_splits", "[val, train]", "--bootstrap", 20, "--breakdown", "--proposals", found)
    found.write_text(json.dumps(results_of(coco, "val", True) + results_of(coco, "train", True)))
    expected = said("evaluate", found, "--data.root", voc, *options)
    assert expected["images"] == 16 and 0 < expected["AP50_voc"] < 1
    assert (expected["difficult"] > 5) == (both.name == "coco")
    assert said("evaluate", found, *both.options, *options) == expected


def test_evaluate_by_the_ids_of_the_file_without_images(both, said, tmp_path):
    voc, coco = both.voc, both.voc.parent / "coco"
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
    coco = both.voc.parent / "coco"
    found = tmp_path / "found.json"
    for key, words in (("image_id", "is of image 1, which is not in val"), ("category_id", "or the numbers 5, 8")):
        entry = results_of(coco, "val", False)[0] | {key: 1}
        found.write_text(json.dumps([entry]))
        options = ("--data.root", coco, "--data.val_splits", "[val]", "--data_format", "coco")
        result = frcnn("evaluate", found, *options, cwd=tmp_path)
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1


def test_anchors(both, said, tiny_config):
    options = ("anchors", "--config", tiny_config, "--suggest", 2)
    expected = said(*options, "--data.root", both.voc)
    assert expected["images"] == 12 and (expected["difficult_objects"] > 3) == (both.name == "coco")
    assert said(*options, *both.options) == expected


def test_show_data(both, frcnn, tiny_config, tmp_path):
    sheets, lines = [], []
    for name, data_options in (("voc", ("--data.root", both.voc)), (both.name, both.options)):
        options = ("--output", name, "--images", 4, "--epochs", 2, "--data.val_splits", "[val]")
        more = (*data_options, "--data.augmentation", "ssd_crop")
        result = frcnn("show-data", "--config", tiny_config, *options, *more, cwd=tmp_path)
        assert (result.code, result.err) == (0, "")
        lines.append(result.out.partition(": ")[2])
        sheets.append(np.array(Image.open(tmp_path / name / "ssd_crop.png")))
    assert lines[0] == lines[1] != ""
    np.testing.assert_array_equal(*sheets)


def test_doctor_on_a_healthy_dataset(both, said):
    expected, found = said("doctor", both.voc), said("doctor", both.other, *both.format)
    assert expected["problems"] == [] and expected["splits"] == {"test": 4, "train": 12, "val": 4}
    assert {**found, "dataset": None} == {**expected, "dataset": None}


@pytest.mark.parametrize(("other", "kinds", "breaking"), [("coco", 17, 9), ("yolo", 16, 9)])
def test_doctor_on_a_broken_one(broken_dataset, frcnn, tmp_path, other, kinds, breaking):
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
        elif other == "yolo":
            path.write_bytes(path.read_bytes().replace(b"<difficult>1", b"<difficult>0"))
    if other == "yolo":
        write_yolo(voc, ("train", "val"), names_in(voc), tmp_path / "yolo")
    else:
        for name in ("train", "val"):
            write_coco(voc, name, names_in(voc), tmp_path / "coco")
        (tmp_path / "coco" / "images").symlink_to(voc / "JPEGImages")
    known = ("--data.class_names", f"[{', '.join(broken_dataset.class_names)}]")
    documents = []
    for root, data_format in ((voc, "voc"), (tmp_path / other, other)):
        options = ("--data.train_splits", "[train]", "--data.val_splits", "[val]", "--data_format", data_format)
        result = frcnn("doctor", root, *options, *known, "--format", "json", cwd=tmp_path)
        assert (result.code, result.err) == (1, "")
        document = json.loads(result.out)
        problems = [one for one in document.pop("problems") if one["kind"] not in NOT_IN_ALL[other]]
        document["kinds"] = {kind: count for kind, count in document["kinds"].items() if kind not in NOT_IN_ALL[other]}
        document["effects"] = sorted((one["kind"], one["effect"], one["object"] is None) for one in problems)
        assert all(one["file"] in one["message"] for one in problems)
        documents.append({key: value for key, value in document.items() if key != "dataset"})
    expected, found = documents
    assert len(expected["kinds"]) == kinds and expected["breaks_training"] == breaking, expected["kinds"]
    of_boxes = {"object_size", "aspect_ratio"}  # shares of an image that cannot be read give no pixels
    for key in expected.keys() - (of_boxes if other == "yolo" else set()):
        assert found[key] == expected[key], key
