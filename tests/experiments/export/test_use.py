"""Exported detectors in use: in Python, by predict and benchmark, with 8 bits, as the start of a training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import detector
from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.errors import InputError
from detector.files import PROGRAMS
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.training.lightning_module import FasterRCNNModule
from detector.use.exported import ExportedDetector
from detector.use.reading import read_image
from experiments.benchmark.models import make_images
from experiments.export.card import about_detector
from experiments.export.command import compare
from experiments.export.programs import write_program

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "experiments" / "weights" / "mini_voc.ckpt"


@pytest.fixture(scope="module", params=["torch_export", "onnx"])
def exported(request, export_of_shipped) -> Path:
    """The folder of the shipped detector in a format."""
    return export_of_shipped(request.param)


@pytest.fixture(scope="module")
def shipped() -> detector.TrainedDetector:
    return detector.load(SHIPPED, device="cpu")


@pytest.fixture(scope="module")
def photos(mini_voc) -> list[Path]:
    return sorted((mini_voc / "JPEGImages").iterdir())[:3]


def check_alike(ours: detector.Detections, theirs: detector.Detections) -> None:
    assert len(ours) > 3
    assert (ours.names, ours.size, ours.file_name) == (theirs.names, theirs.size, theirs.file_name)
    assert torch.allclose(ours.boxes, theirs.boxes, atol=1e-2) and torch.allclose(ours.scores, theirs.scores, atol=1e-4)


def test_load_gives_the_same_detections(exported, shipped, photos):
    """Of the folder and of the file; of a path, an array and several; and in tiles."""
    for path in (exported, next(exported.glob("model.*"))):
        d = detector.load(path)
        check_alike(shipped(photos[0]), d(photos[0]))
    check_alike(shipped(read_image(photos[1])), d(read_image(photos[1])))
    for ours, theirs in zip(shipped(photos, batch_size=3), d(iter(photos), batch_size=3), strict=True):
        check_alike(ours, theirs)
    check_alike(detector.load(SHIPPED, "cpu", tile=80)(photos[0]), detector.load(exported, tile=80)(photos[0]))
    assert d.class_names == shipped.class_names and d.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"flip": True}, "flip true: {file} is exported and cannot; give the checkpoint"),
        ({"shortest_sides": [96]}, "shortest_sides [96]: {file} is exported and cannot; give the checkpoint"),
        ({"autocast": torch.bfloat16}, "autocast torch.bfloat16: {file} is exported and cannot; give the checkpoint"),
        ({"device": "cuda"}, "device cuda: {file} computes on the CPU"),
    ],
)
def test_what_it_cannot_is_refused(options, line, exported):
    with pytest.raises(InputError) as caught:
        detector.load(exported, **options)
    assert str(caught.value) == line.format(file=next(exported.glob("model.*")))


def test_nobody_looks_into_it(exported):
    with pytest.raises(InputError, match="is exported and only detects; give the checkpoint"):
        _ = detector.load(exported).module


def test_predict_writes_the_same(exported, frcnn, tmp_path, photos):
    (tmp_path / "photos").mkdir()
    for photo in photos:
        shutil.copy(photo, tmp_path / "photos")
    found = []
    for number, path in enumerate((SHIPPED, exported)):
        words = (
            "predict",
            "--ckpt_path",
            path,
            "--images",
            "photos",
            "--output",
            f"out{number}",
            "--save",
            "[json,voc]",
        )
        result = frcnn(*words, "--precision", "auto" if number else "32-true", cwd=tmp_path)
        assert result.code == 0, result.err
        found.append(json.loads((tmp_path / f"out{number}" / "predictions.json").read_text()))
        assert len(list((tmp_path / f"out{number}" / "Annotations").iterdir())) == 3
    ours, theirs = found
    assert len(ours) == len(theirs) > 20
    assert [one["category_name"] for one in ours] == [one["category_name"] for one in theirs]
    assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-4)
    refused = frcnn(*words, "--flip", cwd=tmp_path)
    assert (refused.code, refused.err.count("\n")) == (2, 1) and "flip true: " in refused.err


def test_benchmark_times_them_in_turn(exported, frcnn, tmp_path):
    words = ("benchmark", "infer", "--size", "[64,96]", "--repeats", "1", "--format", "json")
    result = frcnn(*words, "--batch_sizes", "[2]", "--detectors", f"[{SHIPPED},{exported}]", cwd=tmp_path)
    assert result.code == 0, result.err
    ours, theirs = json.loads(result.out)["cases"]
    assert [one["name"] for one in (ours, theirs)] == [f"{path} 64x96, batch 2" for path in (SHIPPED, exported)]
    assert theirs["peer_ms"] == ours["ours_ms"] > 0 and ours["ratio"] is None
    assert theirs["ratio"] == pytest.approx(ours["ours_ms"] / theirs["ours_ms"])
    refused = frcnn(*words, "--detectors", f"[{exported}]", "--networks", "[vgg16]", cwd=tmp_path)
    assert refused.code == 2 and "--detectors and --networks: give one of them" in refused.err


def test_int8_says_what_it_costs(frcnn, tmp_path, mini_voc, needs_packages_of):
    needs_packages_of("onnx")
    words = ("export", SHIPPED, "--int8", "--output", tmp_path / "int8")
    nothing = frcnn(*words, cwd=tmp_path)
    assert nothing.code == 2 and "--int8: the checkpoint is in no run folder; give --data.root" in nothing.err
    data = ("--data.root", mini_voc, "--data.train_splits", "[train]", "--data.val_splits", "[val]")
    result = frcnn(*words, *data, cwd=tmp_path)
    assert result.code == 0, result.err
    said = result.out.splitlines()[-1]
    assert said.startswith("With 8 bits, on the 4 images of val: AP50_voc ")
    before, after = (
        float(part.split()[-1 if at == 0 else 0]) for at, part in enumerate(said.split(",")[1].split("->"))
    )
    assert before > 0.5 and abs(after - before) < 0.15
    assert f"({after - before:+.4f})" in said
    assert (tmp_path / "int8" / "model.onnx").stat().st_size < 0.5 * 1_100_000 * 4
    assert said in (tmp_path / "int8" / "README.md").read_text()
    other = frcnn("export", SHIPPED, "--int8", "--format", "openvino", "--output", tmp_path / "x", cwd=tmp_path)
    assert other.code == 2 and "--int8: is for --format onnx, not openvino" in other.err


def test_a_training_begins_with_a_folder_of_the_zoo(frcnn, tmp_path, mini_voc, shipped, photos):
    """Its config has all options of the detector; after a step of no size it is the same but for its batch norms."""
    zoo = tmp_path / "zoo"
    result = frcnn("export", SHIPPED, "--format", "safetensors", "--output", zoo, cwd=tmp_path)
    assert result.code == 0 and "config.yaml" in result.out
    assert sorted(one.name for one in zoo.iterdir()) == [
        "README.md",
        "config.yaml",
        "detector.json",
        "model.safetensors",
    ]
    check_alike(shipped(photos[0]), detector.load(zoo, "cpu")(photos[0]))
    words = ("fit", "--config", zoo / "config.yaml", "--model.weights", zoo, "--data.root", mini_voc)
    splits = ("--data.train_splits", "[train]", "--data.val_splits", "[val]", "--data.num_workers", "0")
    short = ("--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    still = ("--model.optimizer.lr", "1e-12", "--model.optimizer.ema_decay", "0", "--run_name", "again")
    trained = frcnn(*words, *splits, *short, *still, cwd=tmp_path)
    assert trained.code == 0, trained.err
    (run,) = tmp_path.glob("runs/*/again")
    ours, theirs = shipped(photos[0], 0.5), detector.load(run, "cpu")(photos[0], 0.5)
    assert len(ours) > 2 and ours.names == theirs.names
    assert torch.allclose(ours.scores, theirs.scores, atol=0.1) and torch.allclose(ours.boxes, theirs.boxes, atol=5)


@pytest.mark.parametrize(
    ("format", "levels", "box_head", "pooling"),
    [("torch_export", "single", "two_fc", "roi_align"), ("onnx", "fpn", "double", "roi_align_legacy")],
)
def test_networks_of_timm_are_exported(format, levels, box_head, pooling, tmp_path, needs_packages_of):
    pytest.importorskip("timm", reason="timm is not installed: pip install 'faster-rcnn-lightning[timm]'")
    needs_packages_of(format)
    torch.manual_seed(0)
    layers: dict[str, Any] = {"levels": levels, "box_head": box_head, "fpn_channels": 32, "box_head_channels": 32}
    module = FasterRCNNModule(
        ["a", "b"],
        BackboneConfig("timm", None, 0, norm="batch", model="test_resnet", **layers),
        AnchorConfig(scales=[2.0, 5.0], aspect_ratios=[0.5, 1.5]),
        RPNConfig(pre_nms_test=100, post_nms_test=30),
        RoIConfig(score_threshold=0.2, pooling=pooling),
    ).eval()
    write_program(module.model, format, tmp_path, about_detector(module, Path("x.ckpt"), {}))
    images = [make_images(size, 1, 4, torch.device("cpu"))[0][0] for size in ((120, 150), (96, 140), (200, 170))]
    like = compare(module.model, ExportedDetector(tmp_path / PROGRAMS[format]), [images[:1], images[1:]])
    assert like.same and like.detections > 10, like.text(made_up=True)
