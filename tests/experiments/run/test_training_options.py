"""Formats and made splits through the command line."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datamodules.voc.format import read_annotation, read_split
from detector.errors import InputError
from experiments.results.runs import read_run
from experiments.results.scored_runs import Scorer
from experiments.run.option_table import find_data_format


@pytest.fixture(scope="module")
def coco_root(mini_voc: Path, tmp_path_factory) -> Path:
    """MiniVOC as COCO JSON: train.json, odd.json, test.json, and a link to its images."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images").symlink_to(mini_voc / "JPEGImages")
    names = sorted(
        {item.name for path in (mini_voc / "Annotations").iterdir() for item in read_annotation(path).objects}
    )
    for split in ("train", "odd", "test"):
        images, annotations = [], []
        for number, stem in enumerate(read_split(mini_voc / "ImageSets" / "Main" / f"{split}.txt")):
            number = 300 - number**2 - 2 * number  # with gaps, in descending order
            images.append({"id": number, "file_name": f"{stem}.jpg"})
            for item in read_annotation(mini_voc / "Annotations" / f"{stem}.xml").objects:
                x1, y1, x2, y2 = item.box
                category = 10 - names.index(item.name)  # the last name gets the first label
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box},
                        **{"iscrowd": 0, "area": box[2] * box[3]},
                    }
                )
        categories = [{"id": 10 - index, "name": name} for index, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def coco_run(coco_root, tiny_config, frcnn, tmp_path_factory) -> Path:
    """The run folder of a training on COCO JSON; the format stands in the config file."""
    cwd = tmp_path_factory.mktemp("run")
    config = yaml.safe_load(tiny_config.read_text())
    config["data"]["root"] = str(coco_root)
    config["trainer"]["max_epochs"] = 2
    (cwd / "coco.yaml").write_text(yaml.safe_dump(config | {"data_format": "coco"}))
    result = frcnn("fit", "--config", "coco.yaml", cwd=cwd)
    assert result.code == 0, result.err
    return cwd / "runs" / "coco" / "seed0"


def test_fit_keeps_the_format_in_its_config(coco_run, coco_root, metrics_of):
    saved = yaml.safe_load((coco_run / "config.yaml").read_text())
    assert saved["data_format"] == "coco" and saved["data"]["train_splits"] == ["train"]
    assert "image_dirs" in saved["data"] and "download" not in saved["data"]
    assert metrics_of(coco_run)["step"] == 12
    classes = [c["name"] for c in sorted(json.loads((coco_root / "train.json").read_text())["categories"], key=_id)]
    assert classes == sorted(classes, reverse=True)
    found = {entry["category_name"] for entry in json.loads((coco_run / "predictions.json").read_text())}
    assert found and found <= set(classes)


def _id(category: dict) -> int:
    return category["id"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_takes_the_format_of_the_checkpoint(coco_run, coco_root, frcnn, tmp_path, metrics_of, command):
    result = frcnn(command, "--ckpt_path", coco_run / "checkpoints" / "last.ckpt", cwd=tmp_path)
    assert result.code == 0, result.err
    assert f"{'val' if command == 'validate' else 'test'}/AP50_voc" in metrics_of(coco_run)
    images = {entry["file_name"] for entry in json.loads((coco_run / "predictions.json").read_text())}
    split = json.loads((coco_root / ("odd.json" if command == "validate" else "test.json")).read_text())
    assert images <= {image["file_name"] for image in split["images"]}


@pytest.mark.parametrize("text_ids", [False, True])
def test_pycocotools_takes_the_predictions_and_gives_our_numbers(
    coco_root, mini_voc, trained, tiny_config, frcnn, metrics_of, tmp_path, text_ids
):
    """The file's ids have gaps and descend; its categories are numbered against the order of the detector's classes."""
    content = json.loads((coco_root / "odd.json").read_text())
    if text_ids:
        for entry in content["images"]:
            entry["id"] = f"img-{entry['id']}"
        for entry in content["annotations"]:
            entry["image_id"] = f"img-{entry['image_id']}"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(coco_root / "images")
    (tmp_path / "data" / "odd.json").write_text(json.dumps(content))
    checkpoint = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path)
    config = yaml.safe_load(tiny_config.read_text()) | {"data_format": "coco"}
    classes = sorted(category["name"] for category in content["categories"])
    config["data"] |= {"root": str(tmp_path / "data"), "train_splits": ["odd"], "test_splits": None}
    (tmp_path / "coco.yaml").write_text(yaml.safe_dump(config | {"data": config["data"] | {"class_names": classes}}))
    result = frcnn("validate", "--config", "coco.yaml", "--ckpt_path", checkpoint, cwd=tmp_path)
    assert result.code == 0, result.err
    written = tmp_path / "runs" / "coco" / "seed0" / "predictions.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "data" / "odd.json")
        scores = COCOeval(truth, truth.loadRes(str(written)), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    ours = metrics_of(written.parent)
    assert ours["val/AP50"] > 0.02
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    theirs = [None if value < 0 else pytest.approx(value, abs=1e-4) for value in scores.stats[:6]]
    assert [ours[f"val/{name}"] for name in names] == theirs
    # Against the same objects in VOC format images and classes are found by their names.
    options = ("--data.root", mini_voc, "--data.val_splits", "[odd]", "--format", "json")
    evaluated = json.loads(frcnn("evaluate", written, *options, cwd=tmp_path).out)
    assert evaluated["detections"] == len(json.loads(written.read_text()))
    assert evaluated["AP50_voc"] == pytest.approx(ours["val/AP50_voc"], rel=0.1)  # there some objects are difficult


def test_equal_file_names_in_two_folders_are_told_apart(tmp_path):
    """Each image has one object, in another place; `frcnn compare` and `frcnn report` read a run so."""
    run, boxes = tmp_path / "run", {"day/1.png": [2, 3, 10, 9], "night/1.png": [20, 10, 9, 10]}
    run.mkdir()
    for name in boxes:
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (32, 24)).save(tmp_path / name)
    content = {
        "images": [{"id": 5 * number, "file_name": name} for number, name in enumerate(boxes)],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"image_id": 5 * n, "category_id": 3, "bbox": box} for n, box in enumerate(boxes.values())],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    found = [
        {"image_id": 5 * n, "file_name": name, "category_id": 3, "category_name": "cat", "bbox": box, "score": 0.5}
        for n, (name, box) in enumerate(boxes.items())
    ]
    data = {"root": str(tmp_path), "train_splits": ["all"], "val_splits": ["all"], "allow_overlap": True}
    for name, document in (("predictions", found), ("metrics", {"val/AP50_voc07": 1.0})):
        (run / f"{name}.json").write_text(json.dumps(document))
    (run / "config.yaml").write_text(yaml.safe_dump({"data_format": "coco", "data": data}))
    assert Scorer("val", resamples=0).score(read_run(run)).values["AP50_voc"] == 1


def test_predict_with_such_a_checkpoint(coco_run, mini_voc, frcnn, tmp_path):
    image = next((mini_voc / "JPEGImages").iterdir())
    result = frcnn(
        *("predict", "--ckpt_path", coco_run / "checkpoints" / "last.ckpt", "--images", image, "--output", "out"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    assert (tmp_path / "out" / f"{image.stem}.jpg").is_file()


def test_options_are_those_of_the_format(frcnn, tiny_config, coco_root, tmp_path):
    options = ("fit", "--config", tiny_config, "--data.root", coco_root, "--data.image_dirs", "[images]")
    assert "image_dirs" in frcnn(*options, cwd=tmp_path).err
    result = frcnn(*options, "--data_format=coco", "--trainer.fast_dev_run", "true", cwd=tmp_path)
    assert result.code == 0, result.err
    result = frcnn(*options, "--data_format", "pascal", cwd=tmp_path)
    line = "frcnn: --data_format pascal: there are voc, coco, yolo, and one's own by class path: my_package.MyFormat\n"
    assert (result.code, result.err) == (2, line)


def test_which_format_is_asked_for(tmp_path):
    for name, text in (("a.yaml", "data_format: coco"), ("b.yaml", "data_format: voc"), ("c.yaml", "trainer: {}")):
        (tmp_path / name).write_text(text)
    a, b, c = (str(tmp_path / f"{name}.yaml") for name in "abc")
    assert find_data_format([]) == "voc"
    assert find_data_format(["--config", a, "--config", c]) == "coco"
    assert find_data_format([f"--config={a}", "-c", b]) == "voc"
    assert find_data_format(["--data_format=coco", "--config", b]) == "coco"
    assert find_data_format(["--config", str(tmp_path / "none.yaml")]) == "voc"
    (tmp_path / "d.yaml").write_text("data_format: [1]")
    with pytest.raises(InputError, match="data_format"):
        find_data_format(["--config", str(tmp_path / "d.yaml")])


# ---- splits that are made ----


def made(frcnn, tiny_config, cwd: Path, *more: object):
    return frcnn(
        *("fit", "--config", tiny_config, "--data.train_splits", "null", "--data.val_splits", "null"),
        *("--data.test_splits", "null", "--data.val_fraction", 0.25, *more),
        cwd=cwd,
    )


def test_made_splits_are_kept_with_the_run_and_used_again(frcnn, tiny_config, mini_voc, tmp_path):
    result = made(frcnn, tiny_config, tmp_path, "--trainer.limit_train_batches", 2)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert f"15 images to train and 5 to validate on; the lists are in {Path('runs/tiny/seed0/splits')}" in result.err
    train, val = ((run / "splits" / f"{part}.txt").read_text().split() for part in ("train", "val"))
    assert len({*train, *val}) == 20 and (len(train), len(val)) == (15, 5)
    images = {entry["file_name"] for entry in json.loads((run / "predictions.json").read_text())}
    assert images and images <= {f"{stem}.jpg" for stem in val}
    # An image moved by hand: the run's own lists count from then on.
    (run / "splits" / "val.txt").write_text("\n".join(val[:1]) + "\n")
    result = frcnn("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", cwd=tmp_path)
    assert result.code == 0 and "images to train" not in result.err, result.err
    images = {entry["file_name"] for entry in json.loads((run / "predictions.json").read_text())}
    assert images <= {f"{val[0]}.jpg"}
    result = frcnn(
        "validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--data.val_fraction", 0.5, cwd=tmp_path
    )
    assert result.code == 2 and "val_fraction 0.25, now 0.5" in result.err


def test_a_failed_start_leaves_no_lists(frcnn, tiny_config, mini_voc, tmp_path):
    result = made(frcnn, tiny_config, tmp_path, "--data.class_names", "[ring]")
    assert result.code == 2 and ".xml" in result.err
    assert list(tmp_path.rglob("splits")) == []
