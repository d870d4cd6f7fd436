"""Exported files beside the detector that they are of; the reader beside them, in a process without torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.files import program_of
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.training.lightning_module import FasterRCNNModule
from detector.use.reading import read_image
from experiments.benchmark.models import make_images

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "experiments" / "weights" / "mini_voc.ckpt"


@pytest.fixture(scope="module", params=["onnx", "openvino", "torch_export"])
def exported(request, export_of_shipped) -> Path:
    """The folder of the shipped detector in a format."""
    return export_of_shipped(request.param)


@pytest.fixture(scope="module")
def shipped() -> FasterRCNNModule:
    return FasterRCNNModule.from_checkpoint(SHIPPED)


def images_of(*sizes: tuple[int, int]) -> list[Tensor]:
    return [make_images(size, 1, 4, torch.device("cpu"))[0][0] for size in sizes]


def check_same(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> int:
    """Equal numbers of detections, matched one to one by label, box and score; return how many."""
    for one, other in zip(ours, theirs, strict=True):
        assert len(one["boxes"]) == len(other["boxes"])
        left = list(range(len(one["boxes"])))
        for box, label, score in zip(other["boxes"], other["labels"], other["scores"], strict=True):
            fits = [
                i
                for i in left
                if one["labels"][i] == label
                and abs(float(one["scores"][i] - score)) < 1e-4
                and float((one["boxes"][i] - box).abs().max()) < 1e-2
            ]
            assert fits
            left.remove(fits[0])
    return sum(len(one["boxes"]) for one in ours)


def test_detections_are_those_of_the_detector_at_other_numbers_and_sizes(exported, shipped):
    """It was traced with two images; blank ones, on which all anchors of a kind score alike, are among them."""
    from detector.use.exported import ExportedDetector

    other = ExportedDetector(program_of(exported))
    assert other.class_names == shipped.class_names
    found = 0
    for sizes in ([(120, 150)], [(90, 200), (150, 150)], [(112, 112), (300, 217), (64, 64), (112, 180), (333, 500)]):
        images = images_of(*sizes)
        with torch.inference_mode():
            found += check_same(shipped(images), other(images))
    assert found > 100
    blank = [torch.zeros(3, 112, 150, dtype=torch.uint8), torch.full((3, 140, 112), 128, dtype=torch.uint8)]
    with torch.inference_mode():
        check_same(shipped(blank), other(blank))


def test_reader_needs_neither_torch_nor_this_package(exported, shipped, read_without_torch, tmp_path):
    """It reads as training does: files turned by EXIF, grey, with an alpha channel, of 16 bits."""
    if not (exported / "detect.py").exists():
        assert (exported / "model.pt2").exists()  # what runs it is torch
        return
    pixels = make_images((150, 210), 1, 4, torch.device("cpu"))[0][0].permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "plain.jpg", quality=95)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack((pixels, pixels[..., 0]))).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., 1].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    names = ["turned.png", "plain.jpg", "grey.png", "alpha.png", "deep.png"]
    theirs = read_without_torch(exported, names, tmp_path)
    ours = [torch.from_numpy(read_image(tmp_path / name, upright=True)).permute(2, 0, 1) for name in names]
    with torch.inference_mode():
        assert check_same([shipped([image])[0] for image in ours], theirs) > 20


def test_file_and_folder_say_what_it_is(exported, shipped):
    about = json.loads((exported / "detector.json").read_text())
    assert about["class_names"] == ["cross", "ellipse", "rectangle", "ring", "star", "triangle"]
    assert about["image"]["shortest_side"] == 112 and about["image"]["mean"] == [0.485, 0.456, 0.406]
    assert about["options"]["anchors"]["aspect_ratios"] == [0.4, 1.0, 2.5]
    from detector.use.exported import ExportedDetector

    assert ExportedDetector(program_of(exported)).about == about  # in the file itself, too
    card = (exported / "README.md").read_text()
    assert "cross, ellipse, rectangle, ring, star, triangle" in card and "boxes differ by up to" in card


def small_network(**roi: Any) -> FasterRCNNModule:
    """A detector with random weights and many detections."""
    torch.manual_seed(0)
    module = FasterRCNNModule(
        ["a", "b", "c"],
        BackboneConfig("small_c4", None, 0, norm="batch"),
        AnchorConfig(scales=[2.0, 5.0], aspect_ratios=[0.5, 1.5]),
        RPNConfig(pre_nms_test=200, post_nms_test=40, min_side=6.0, min_side_scales=True, objectness="softmax"),
        RoIConfig(score_threshold=0.2, **roi),
        ImageConfig(shortest_side=[96], longest_side=160, channel_order="bgr", pixel_max=255, std=[60.0, 61.0, 62.0]),
    )
    torch.nn.init.normal_(module.model.rpn.head.objectness.weight, std=0.05)
    for stage in module.model.roi_heads.stages:
        torch.nn.init.normal_(stage.predictor.scores.weight, std=0.1)
    return module.eval()


@pytest.mark.parametrize(
    "roi",
    [
        {"pooling": "roi_pool", "class_agnostic": True, "delta_mean": [0.1, 0.0, -0.1, 0.0]},
        {"cascade_ious": [0.5, 0.6, 0.7], "class_agnostic": True, "delta_init_std": 0.1},
    ],
)
def test_other_options(roi, needs_packages_of, tmp_path):
    needs_packages_of("onnx")
    from detector.use.exported import ExportedDetector
    from experiments.export.card import about_detector
    from experiments.export.programs import write_program

    module = small_network(**roi)
    write_program(module.model, "onnx", tmp_path, about_detector(module, Path("x.ckpt"), {}))
    images = images_of((120, 150), (96, 140), (200, 170))
    with torch.inference_mode():
        assert check_same(module(images), ExportedDetector(tmp_path / "model.onnx")(images)) > 10


def test_parts_of_ones_own_are_traced_and_named(tmp_path, frcnn_main, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests" / "experiments" / "run")
    from detector.use.exported import ExportedDetector
    from experiments.export import network

    lines: list[str] = []
    monkeypatch.setattr(network, "rank_zero_info", lines.append)
    torch.manual_seed(0)
    module = FasterRCNNModule(
        ["a", "b", "c"],
        BackboneConfig("every_part.Tiny", None, frozen_stages=0, box_head="every_part.Mean"),  # type: ignore[arg-type]
        AnchorConfig(generator="every_part.Squares"),  # type: ignore[arg-type]
        RPNConfig(pre_nms_test=200, post_nms_test=40, head="every_part.LinearHead", coder="every_part.Corners"),  # type: ignore[arg-type]
        RoIConfig(score_threshold=0.2, coder="every_part.Corners"),  # type: ignore[arg-type]
        ImageConfig(shortest_side=[96], longest_side=160),
    )
    torch.nn.init.normal_(module.model.roi_heads.predictor.scores.weight, std=3.0)
    torch.nn.init.normal_(module.model.roi_heads.predictor.deltas.weight, std=0.5)
    content = torch.load(SHIPPED, weights_only=True)
    content |= {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(content, tmp_path / "x.ckpt")
    code = frcnn_main("export", tmp_path / "x.ckpt", "--format", "torch_export", "--output", tmp_path / "out")
    assert code == 0, capsys.readouterr().err
    parts = {"backbone.name": "Tiny", "backbone.box_head": "Mean", "anchors.generator": "Squares"}
    parts |= {"rpn.head": "LinearHead", "rpn.coder": "Corners", "roi.coder": "Corners"}
    begins = [f"warning: {name} every_part.{part}: whether a part of one's own" for name, part in parts.items()]
    assert [line[: len(begin)] for line, begin in zip(lines, begins, strict=True)] == begins
    images = images_of((120, 150), (96, 140), (200, 170))
    with torch.inference_mode():
        found = module.eval()(images)
        assert check_same(found, ExportedDetector(program_of(tmp_path / "out"))(images)) > 10


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"roi": {"nms": "soft_linear"}}, "roi.nms soft_linear: cannot be exported; hard can: --hard_nms"),
        (
            {"roi": {"pooling": "roi_pool_floor"}},
            "roi.pooling roi_pool_floor: cannot be exported; roi_align, roi_align_legacy and roi_pool can",
        ),
        ({"image": {"test_flip": True}}, "image.test_flip true: cannot be exported; false can"),
        (
            {"image": {"test_shortest_sides": [96, 112]}},
            "image.test_shortest_sides [96, 112]: cannot be exported; [] can",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(options, line, tmp_path, capsys, frcnn_main):
    content = torch.load(SHIPPED, weights_only=True)
    for part, values in options.items():
        content["hyper_parameters"][part] |= values
    torch.save(content, tmp_path / "x.ckpt")
    assert frcnn_main("export", tmp_path / "x.ckpt", "--format", "torch_export", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.strip() == f"frcnn: {line}"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def frcnn_main() -> Any:
    from experiments.cli import main

    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.mark.parametrize("config", ["seed_everything: 3\n", "seed_everything: [\n"])
def test_a_run_that_was_interrupted_has_no_metrics_yet(config, tmp_path, capsys, frcnn_main):
    run, out = tmp_path / "seed3", tmp_path / "out"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(SHIPPED, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text(config)
    code = frcnn_main("export", run, "--format", "safetensors", "--output", out)
    if "[" in config:  # said before anything is written
        assert code == 2 and not out.exists()
        assert capsys.readouterr().err.strip() == f"frcnn: {run}: is no run folder: config.yaml is missing or damaged"
    else:
        assert code == 0
        assert "Not known: the run was not evaluated." in (out / "README.md").read_text()


def test_int8_of_a_run_whose_config_tells_no_data(needs_packages_of, tmp_path, capsys, frcnn_main):
    needs_packages_of("onnx")
    run = tmp_path / "seed3"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(SHIPPED, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text("seed_everything: 3\n")
    assert frcnn_main("export", run, "--int8", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.strip() == f"frcnn: {run / 'config.yaml'}: data: None; options are needed"
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_the_extra(tmp_path, capsys, frcnn_main, monkeypatch):
    from detector.use import exported

    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    assert frcnn_main("export", SHIPPED, "--output", tmp_path / "out") == 2
    expected = "--format onnx: needs onnx, onnxscript, onnxruntime, not installed; pip install"
    assert capsys.readouterr().err.strip() == f"frcnn: {expected} 'faster-rcnn-lightning[export]'"


def test_a_folder_with_other_files_is_refused(tmp_path, capsys, frcnn_main):
    (tmp_path / "thesis.tex").touch()
    assert frcnn_main("export", SHIPPED, "--output", tmp_path) == 2
    expected = f"--output {tmp_path}: holds thesis.tex, which an export to onnx does not write; give a new folder"
    assert capsys.readouterr().err.strip() == f"frcnn: {expected}"


def test_safetensors_are_a_start_and_a_detector(tmp_path, frcnn_main, shipped, capsys):
    """The folder and the file serve for detecting, and as the weights of another training."""
    folder = tmp_path / "zoo"
    assert frcnn_main("export", SHIPPED, "--format", "safetensors", "--output", folder, "--license", "CC0") == 0
    assert "| licence of the weights | CC0 |" in (folder / "README.md").read_text()
    layout = ["README.md", "config.yaml", "detector.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == layout
    images = images_of((120, 150))
    with torch.inference_mode():
        for path in (folder, folder / "model.safetensors"):
            (found,), (ours,) = FasterRCNNModule.from_checkpoint(path)(images), shipped(images)
            assert len(found["boxes"]) > 5 and torch.equal(found["boxes"], ours["boxes"])
    options = {name: shipped.hparams[name] for name in ("backbone", "anchors", "rpn", "roi", "image")}
    begun = FasterRCNNModule(["ring", "square"], **options, weights=str(folder), weights_predictor="by_name")
    assert begun.weights_report is not None
    assert begun.weights_report.remark == "1 of the data's 2 classes, by name; at random: square"
    rows = begun.model.roi_heads.predictor.scores.weight
    assert torch.equal(rows[1], shipped.model.roi_heads.predictor.scores.weight[4])  # ring
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    words = ("predict", "--ckpt_path", folder, "--images", tmp_path / "a.png", "--output", tmp_path / "out")
    assert frcnn_main(*words, "--accelerator", "cpu") == 0


def test_safetensors_of_others_are_no_detector(tmp_path, capsys, frcnn_main):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    words = ("predict", "--ckpt_path", tmp_path / "other.safetensors", "--images", tmp_path, "--output", tmp_path / "o")
    (tmp_path / "a.png").write_bytes(b"")
    assert frcnn_main(*words) == 2
    assert "other.safetensors: holds weights alone; give a file of frcnn export --format safetensors" in (
        capsys.readouterr().err
    )


def test_evaluate_takes_an_exported_file(frcnn, tmp_path, mini_voc, export_of_shipped):
    """Its numbers are those that the detector's own results have."""
    folder = export_of_shipped("torch_export")
    images = mini_voc / "JPEGImages"
    words = ("predict", "--ckpt_path", SHIPPED, "--images", images, "--output", tmp_path / "o", "--save", "json")
    assert frcnn(*words, "--accelerator", "cpu", cwd=tmp_path).code == 0
    results = json.loads((tmp_path / "o" / "predictions.json").read_text())
    kept = set((mini_voc / "ImageSets" / "Main" / "val.txt").read_text().split())
    (tmp_path / "val.json").write_text(json.dumps([one for one in results if Path(one["file_name"]).stem in kept]))
    data = ("--data.root", mini_voc, "--data.val_splits", "[val]", "--format", "json")
    ours, theirs = (
        json.loads(frcnn("evaluate", path, *data, cwd=tmp_path).out) for path in (tmp_path / "val.json", folder)
    )
    assert theirs["AP50_voc07"] > 0.5
    assert theirs["detections"] == ours["detections"] > 20
    assert {name: theirs[name] for name in ("AP", "AP50", "AP50_voc07")} == pytest.approx(
        {name: ours[name] for name in ("AP", "AP50", "AP50_voc07")}, abs=1e-4
    )


def test_soft_nms_is_replaced_where_that_is_asked_for(shipped, tmp_path, capsys, frcnn_main):
    from detector.use.exported import ExportedDetector

    content = torch.load(SHIPPED, weights_only=True)
    content["hyper_parameters"]["roi"]["nms"] = "soft_linear"
    torch.save(content, tmp_path / "x.ckpt")
    command = ("export", tmp_path / "x.ckpt", "--format", "torch_export", "--output", tmp_path / "out", "--hard_nms")
    assert frcnn_main(*command) == 0
    said = "NMS is hard here, soft_linear in the run, whose metrics are those of the latter."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "README.md").read_text()
    images = images_of((120, 150), (96, 140))
    with torch.inference_mode():
        assert check_same(shipped(images), ExportedDetector(program_of(tmp_path / "out"))(images)) > 10
