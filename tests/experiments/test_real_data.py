"""Genuine VOC2012 images and ImageNet weights, where they are at hand."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from datamodules.voc.datamodule import VOCDataModule
from detector.backbones.base import BackboneConfig
from detector.training.lightning_module import FasterRCNNModule

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "experiments" / "voc12_subset_mobilenet_v2.yaml"

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def devkit(genuine_voc) -> Path:
    """The folder that holds VOC2012/; read-only."""
    return genuine_voc("voc2012-subset.tar")


@pytest.fixture(scope="module")
def weights(shared_file) -> Path:
    return shared_file("mobilenet_v2_imagenet.safetensors")


@pytest.mark.parametrize(("split", "images"), [("train", 714), ("val", 250)])
def test_counts(devkit, split, images):
    """Of images, objects, difficult objects and classes, against the XML files themselves; and one box of each."""
    voc = devkit / "VOC2012"
    names = (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    trees = [ElementTree.parse(voc / "Annotations" / f"{name}.xml") for name in names]
    objects = [[node for node in tree.getroot() if node.tag == "object"] for tree in trees]
    data = VOCDataModule(str(devkit), train_splits=["2012_train"], val_splits=["2012_val"], num_workers=0)
    data.setup("fit")
    dataset = data.train_dataset if split == "train" else data.val_dataset
    targets = [dataset.target(index) for index in range(len(dataset))]
    assert len(dataset) == len(names) == images
    assert [target["file_name"] for target in targets] == [f"{name}.jpg" for name in names]
    assert [len(target["labels"]) for target in targets] == [len(nodes) for nodes in objects]
    flat = [node for nodes in objects for node in nodes]
    difficult = sum(node.findtext("difficult") == "1" for node in flat)
    assert sum(int(target["difficult"].sum()) for target in targets) == difficult
    assert difficult > 0
    classes = Counter(data.class_names[label - 1] for target in targets for label in target["labels"].tolist())
    assert classes == Counter(node.findtext("name") for node in flat)
    for target, nodes in zip(targets, objects, strict=True):
        box = {key: float(nodes[0].findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax")}
        expected = [box["xmin"] - 1, box["ymin"] - 1, box["xmax"], box["ymax"]]
        assert target["boxes"][0].tolist() == pytest.approx(expected)


def test_imagenet_weights_leave_nothing_out(weights):
    from safetensors.torch import load_file

    module = FasterRCNNModule(["a"], BackboneConfig(name="mobilenet_v2_c4", weights=str(weights)))
    report = module.model.backbone.weights_report
    assert report is not None
    assert report.missing == []
    assert report.loaded > 200
    stored = load_file(weights)
    assert torch.equal(module.model.backbone.state_dict()["body.features.0.0.weight"], stored["features.0.0.weight"])


def test_first_steps_of_the_experiment(devkit, weights, frcnn, tmp_path):
    """Three steps; what is frozen stays as it was loaded, the rest moves."""
    from safetensors.torch import load_file

    result = frcnn(
        *("fit", "--config", CONFIG, "--data.root", devkit, "--model.backbone.weights", weights),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", 3),
        *("--trainer.limit_train_batches", 3, "--trainer.limit_val_batches", 1, "--trainer.num_sanity_val_steps", 0),
        *("--trainer.log_every_n_steps", 1, "--data.batch_size", 2, "--data.num_workers", 0),
        *("--trainer.enable_progress_bar", "false"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    run = tmp_path / "runs" / CONFIG.stem / "seed0"
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    assert metrics["step"] == 3
    losses = [metrics[f"train/loss_{part}"] for part in ("rpn_cls", "rpn_reg", "roi_cls", "roi_reg")]
    assert all(loss is not None and math.isfinite(loss) and loss >= 0 for loss in losses)
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["current_model_state"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trained.values())
    stored = load_file(weights)
    moved = {
        name: not torch.equal(trained[f"model.backbone.body.{name}"], tensor)
        for name, tensor in stored.items()
        if f"model.backbone.body.{name}" in trained and name.endswith("weight") and tensor.ndim == 4
    }
    assert not moved["features.0.0.weight"]
    assert moved[max(moved, key=lambda name: int(name.split(".")[1]))]


def eight_images(devkit: Path, folder: Path) -> Path:
    """A plain dataset of the first eight training images with one to three objects, none of them difficult."""
    voc = devkit / "VOC2012"
    chosen: list[str] = []
    for name in (voc / "ImageSets" / "Main" / "train.txt").read_text().split():
        nodes = ElementTree.parse(voc / "Annotations" / f"{name}.xml").getroot().findall("object")
        if 1 <= len(nodes) <= 3 and all(node.findtext("difficult") == "0" for node in nodes):
            chosen.append(name)
    for part, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (folder / part).mkdir(parents=True)
        for name in chosen[:8]:
            shutil.copy(voc / part / f"{name}.{suffix}", folder / part)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "eight.txt").write_text("\n".join(chosen[:8]) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_images_are_learnt_by_heart(devkit, weights, frcnn, tmp_path):
    """Data, targets, losses and evaluation agree: 160 steps on eight images, and they are found again."""
    data = eight_images(devkit, tmp_path / "eight")
    result = frcnn(
        *("fit", "--config", CONFIG, "--data.root", data, "--model.backbone.weights", weights),
        *("--data.train_splits", "[eight]", "--data.val_splits", "[eight]", "--data.allow_overlap", "true"),
        *("--data.augmentation", "none", "--data.batch_size", 4, "--data.num_workers", 0),
        *("--model.optimizer.schedule", "constant", "--model.optimizer.lr", 0.0004),
        *("--model.optimizer.warmup_steps", 20, "--model.optimizer.ema_decay", 0.9),
        *("--trainer.max_epochs", 80, "--trainer.check_val_every_n_epoch", 80, "--trainer.precision", "32-true"),
        *("--trainer.num_sanity_val_steps", 0, "--trainer.enable_progress_bar", "false"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "runs" / CONFIG.stem / "seed0" / "metrics.json").read_text())
    assert metrics["step"] == 160
    assert metrics["val/AP50_voc"] >= 0.95
