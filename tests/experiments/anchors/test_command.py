"""`frcnn anchors`, and the warnings at the start of a training."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from detector.training.callbacks.anchor_telemetry import AnchorTelemetry
from experiments.anchors.warnings import AnchorWarnings

KEYS = {"images", "objects", "mean_best_iou", "share_iou_50", "share_iou_70", "share_rescued", "anchors"}
ANCHOR_KEYS = {"scale", "aspect_ratio", "width", "height", "legal_share", "images_without", "best_match_share"}


@pytest.fixture
def document(frcnn, tiny_config, tmp_path):
    """Run with `--format json` and read what is printed."""

    def run(*options: Any, config: Path = tiny_config) -> dict[str, Any]:
        result = frcnn("anchors", "--config", config, "--format", "json", *options, cwd=tmp_path)
        assert result.code == 0, result.err
        document: dict[str, Any] = json.loads(result.out)
        return document

    return run


@pytest.fixture
def complaint(frcnn, tiny_config, tmp_path):
    """Run a command that must be refused, and return its one line."""

    def run(*options: Any, config: Path = tiny_config) -> str:
        result = frcnn("anchors", "--config", config, *options, cwd=tmp_path)
        assert result.code == 2, result
        assert result.out == ""
        lines = [line for line in result.err.splitlines() if line]
        assert len(lines) == 1, result.err
        assert lines[0].startswith("frcnn: ")
        return str(lines[0])

    return run


def xml_objects(dataset: Path, split: str) -> tuple[int, int]:
    """Images of a split and objects in them, by text search."""
    stems = (dataset / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    texts = [(dataset / "Annotations" / f"{stem}.xml").read_text() for stem in stems]
    return len(stems), sum(text.count("<object>") for text in texts)


def test_says_which_rule_it_audits(document, frcnn, tiny_config, tmp_path):
    by_iou, other = document(), document("--model.rpn.matcher", "atss", "--model.rpn.positive_iou", "0.6")
    assert (by_iou["rule"], by_iou["other_matcher"]) == ("IoU from 0.7 on, or an object's best", None)
    assert (other["rule"], other["other_matcher"]) == ("IoU from 0.6 on, or an object's best", "atss")
    assert any("only because their best ones count" in line for line in by_iou["warnings"])
    assert not any("positive" in line for line in other["warnings"])
    own = ("--model.rpn.matcher", "detector.assignment.IoUMatcher", "--model.rpn.matcher.positive_iou", "0.4")
    assert document(*own)["rule"] == "IoU from 0.4 on"
    table = frcnn("anchors", "--config", tiny_config, "--model.rpn.matcher", "simota", cwd=tmp_path).out
    assert "(positive: IoU from 0.7 on, or an object's best; the training has rpn.matcher simota instead)\n" in table


def test_keys_and_counts(document, mini_voc):
    found = document()
    assert set(found) >= KEYS
    images, objects = xml_objects(mini_voc, "train")
    assert (found["images"], found["objects"]) == (images, objects - found["difficult_objects"])
    assert found["strides"] == [8]
    assert [set(anchor) >= ANCHOR_KEYS for anchor in found["anchors"]] == [True, True]
    assert [(a["scale"], a["aspect_ratio"], a["width"], a["height"]) for a in found["anchors"]] == [
        (1, 1, 16, 16),
        (2, 1, 32, 32),
    ]
    assert sum(group["objects"] for group in found["by_class"].values()) == found["objects"]


def test_options_change_the_audit(document):
    wide = document("--model.anchors.scales", "[1.5]", "--model.anchors.aspect_ratios", "[0.25]")["anchors"]
    assert [(a["scale"], a["aspect_ratio"], a["width"], a["height"]) for a in wide] == [(1.5, 0.25, 48, 12)]
    assert document("--data.train_splits", "[odd]")["images"] == 7
    assert document("--model.backbone.name", "mobilenet_v2_fpn")["strides"] == [4, 8, 16, 32, 64]
    larger = document("--model.image.shortest_side", "[96]", "--model.image.longest_side", "144")
    assert larger["anchors"][1]["legal_share"] > document()["anchors"][1]["legal_share"]


def test_sizes_audit_the_same_as_their_scales_and_ratios(document, frcnn, tiny_config, tmp_path):
    """16 x 64 and 96 x 24: areas of 32^2 and 48^2, heights 4 times and a quarter of the width."""
    options = ("--model.anchors.straddling", "drop", "--model.anchors.sizes", "[[16, 64], [96, 24]]")
    free, expected = document(*options), []
    for scale, ratio in ((2, 4), (3, 0.25)):
        given = ("--model.anchors.scales", f"[{scale}]", "--model.anchors.aspect_ratios", f"[{ratio}]")
        (row,) = document(*options[:2], *given)["anchors"]
        expected.append({"scale": None} | {key: row[key] for key in ("aspect_ratio", "width", "height", "legal_share")})
    assert [{key: row[key] for key in expected[0]} for row in free["anchors"]] == expected
    table = frcnn("anchors", "--config", tiny_config, *options[:3], "[[16, 64], [320, 300]]", cwd=tmp_path).out
    assert "dead anchor: 320 x 300 pixels, stride 8 fits into no image" in table
    assert re.search(r"^ +8 +- +0\.9375 +320 x 300 +0\.0 % +12 images", table, re.MULTILINE)


def test_difficult_objects_as_in_training(document, mini_voc, tmp_path):
    copied = Path(shutil.copytree(mini_voc, tmp_path / "copied"))
    stem = (copied / "ImageSets" / "Main" / "train.txt").read_text().split()[0]
    path = copied / "Annotations" / f"{stem}.xml"
    path.write_text(re.sub("<difficult>.</difficult>", "<difficult>1</difficult>", path.read_text()))
    objects = xml_objects(mini_voc, "train")[1]
    counts = {
        treatment: document("--data.root", copied, "--model.difficult", treatment)
        for treatment in ("drop", "keep", "ignore")
    }
    difficult = counts["keep"]["difficult_objects"]
    assert difficult >= path.read_text().count("<object>")
    assert {name: found["objects"] for name, found in counts.items()} == {
        "drop": objects - difficult,
        "keep": objects,
        "ignore": objects - difficult,
    }


def test_images_are_not_needed(document, mini_voc, tmp_path):
    copied = Path(shutil.copytree(mini_voc, tmp_path / "copied"))
    shutil.rmtree(copied / "JPEGImages")
    bare = document("--data.root", copied)
    assert bare == document()


def test_configuration_of_a_run(document, trained):
    assert document(config=trained / "config.yaml") == document()


def test_table_names_dead_anchors(frcnn, tiny_config, tmp_path):
    options = ("--model.anchors.straddling", "drop", "--model.anchors.scales", "[1, 20]")
    result = frcnn("anchors", "--config", tiny_config, *options, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "dead anchor: scale 20, ratio 1 (320 x 320 pixels, stride 8) fits into no image" in result.out
    assert re.search(r"^ +8 +20 +1 +320 x 320 +0\.0 % +12 images +0\.0 %", result.out, re.MULTILINE)
    for word in ("all objects", "triangle", "by size after resizing", "positive anchors per image", "straddling"):
        assert word in result.out


def test_suggestion_can_be_pasted(frcnn, document, tiny_config, tmp_path):
    found = document("--suggest", "2")
    suggestion = found["suggestion"]
    assert suggestion["given_mean_best_iou"] == pytest.approx(found["mean_best_iou"], abs=1e-5)
    options = re.findall(r'(--\S+) "([^"]+)"', suggestion["options"])
    assert [name for name, _ in options] == ["--model.anchors.scales", "--model.anchors.aspect_ratios"]
    better = document(*(part for option in options for part in option))
    assert [anchor["scale"] for anchor in better["anchors"]] == suggestion["scales"]
    assert better["mean_best_iou"] > found["mean_best_iou"]
    table = frcnn("anchors", "--config", tiny_config, "--suggest", "2", cwd=tmp_path).out
    assert suggestion["options"] in table
    assert {key: value for key, value in better.items() if key != "anchors"}.items() >= {
        key: value for key, value in suggestion["audit"].items() if key != "anchors"
    }.items()
    change = f"{found['mean_best_iou']:.3f} -> {better['mean_best_iou']:.3f}"
    assert re.search(rf"before -> after.*\n +all objects +{change} ", table)


def test_suggested_sizes_can_be_pasted(document):
    suggestion = document("--suggest", "3", "--suggest_form", "sizes")["suggestion"]
    ((name, value),) = re.findall(r'(--\S+) "([^"]+)"', suggestion["options"])
    assert name == "--model.anchors.sizes"
    better = document(name, value)
    sides = [side for anchor in better["anchors"] for side in (anchor["width"], anchor["height"])]
    assert sides == pytest.approx([side for size in suggestion["sizes"] for side in size], rel=1e-6)
    assert better["mean_best_iou"] == pytest.approx(suggestion["audit"]["mean_best_iou"])


def test_plot(frcnn, tiny_config, tmp_path):
    result = frcnn("anchors", "--config", tiny_config, "--plot", "new/plot.png", "--format", "json", cwd=tmp_path)
    assert result.code == 0, result.err
    json.loads(result.out)
    with Image.open(tmp_path / "new" / "plot.png") as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def test_dataset_without_objects(frcnn, document, mini_voc, tiny_config, tmp_path):
    copied = Path(shutil.copytree(mini_voc, tmp_path / "copied"))
    for path in (copied / "Annotations").glob("*.xml"):
        path.write_text(re.sub("<object>.*</object>", "", path.read_text(), flags=re.DOTALL))
    options = ("--data.root", copied, "--data.class_names", "[cat]", "--plot", tmp_path / "empty.svg")
    found = document(*options)
    assert (found["images"], found["objects"], found["mean_best_iou"], found["by_class"]) == (12, 0, None, {})
    assert (tmp_path / "empty.svg").is_file()
    result = frcnn("anchors", "--config", tiny_config, *options, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "12 images, 0 objects" in result.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.anchors.scale", "[8]"], "model.anchors.scale"),
        (["--model.anchors.scales", "many"], "scales"),
        (["--model.anchors.scales", "[[1], [2]]"], "2 lists for 1 levels"),
        (["--model.anchors.aspect_ratios", "[0]"], "aspect_ratios"),
        (["--model.backbone.name", "vgg17"], "vgg17"),
        (["--data.root", "no_such_folder"], "no_such_folder"),
        (["--data.train_splits", "[trian]"], "trian.txt"),
        (["--data.train_splits", "[]"], "--data.train_splits is empty"),
        (["--suggest", "0"], "--suggest 0"),
        (["--suggest_form", "sizes"], "--suggest_form: goes with --suggest"),
        (
            ["--model.anchors.sizes", "[[9, 5, 3]]"],
            "anchors.sizes: [[9.0, 5.0, 3.0]] must be a list of [width, height]",
        ),
        (["--suggest", "few"], "suggest"),
        (["--plot", "anchors.docx"], "anchors.docx"),
        (["--format", "yaml"], "yaml"),
        (["--scales", "[8]"], "--scales"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(complaint, options, named):
    assert named in complaint(*options)


def test_bad_config_files(complaint, tiny_config, tmp_path):
    assert "nowhere.yaml" in complaint(config=Path("nowhere.yaml"))
    config = yaml.safe_load(tiny_config.read_text())
    config["model"]["anchors"]["scale"] = config["model"]["anchors"].pop("scales")
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    assert "scale" in complaint(config=tmp_path / "typo.yaml")


def test_help(frcnn, tmp_path):
    result = frcnn("anchors", "--help", cwd=tmp_path)
    assert result.code == 0
    assert result.out.startswith("usage: frcnn anchors ")
    for option in ("--suggest", "--plot", "--format", "--model.anchors", "frcnn anchors --help all"):
        assert option in result.out


# ---- at the start of a training ----


def test_fit_warns_of_dead_anchors(frcnn, tiny_config, tmp_path):
    options = ("--model.anchors.straddling", "drop", "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    result = frcnn("fit", "--config", tiny_config, *options, "--model.anchors.scales", "[1, 20]", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "warning: dead anchor: scale 20, ratio 1 (320 x 320 pixels, stride 8)" in result.err


class Trainer(SimpleNamespace):
    is_global_zero = True


def test_a_failing_audit_stops_no_training(capsys):
    AnchorWarnings().on_fit_start(Trainer(datamodule=None), SimpleNamespace(model=None))  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_a_sample_is_called_one(mini_voc, capsys):
    from datamodules.voc.datamodule import VOCDataModule
    from detector.anchors import AnchorConfig, AnchorGenerator
    from detector.image_batch import ImageConfig
    from detector.rpn import RPNConfig

    data = VOCDataModule(str(mini_voc), ["train"], ["val"], num_workers=0)
    data.setup("fit")
    config = AnchorConfig(scales=[40], aspect_ratios=[1])
    model = SimpleNamespace(
        rpn=SimpleNamespace(anchor_generator=AnchorGenerator(config, [16]), config=RPNConfig()),
        backbone=SimpleNamespace(strides=(16,)),
        image_config=ImageConfig(),
        difficult="drop",
    )
    telemetry = AnchorTelemetry()
    trainer: Any = Trainer(datamodule=data, callbacks=[telemetry])
    AnchorWarnings(images=5).on_fit_start(trainer, SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert np.isnan(telemetry.expected).all()  # of no positive anchor at all
    lines = capsys.readouterr().err.splitlines()
    assert "dead anchor: scale 40" in lines[0]
    assert "(from 4 of 12 images)" in lines[0]
    assert len([line for line in lines if line.startswith("warning: ")]) == 3
    AnchorWarnings().on_fit_start(
        Trainer(datamodule=data, is_global_zero=False),  # type: ignore[arg-type]
        SimpleNamespace(model=model),
    )
    assert capsys.readouterr().err == ""
