"""Parts of one's own, one of each kind, by command line and by YAML: trained, resumed, evaluated, refused."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from detector.errors import flat_options
from experiments.ablation.grid import label_of
from experiments.run.option_table import with_whole_names

PARTS = Path(__file__).with_name("every_part.py")
OPTIONS = {
    "model.backbone": "Tiny",
    "model.backbone.width": 12,
    "model.backbone.box_head": "Mean",
    "model.anchors": "Squares",
    "model.anchors.sides": "[16,32]",
    "model.rpn.head": "LinearHead",
    "model.rpn.matcher": "Halves",
    "model.rpn.matcher.iou": 0.3,
    "model.rpn.sampler": "First",
    "model.rpn.coder": "Corners",
    "model.rpn.cls_loss": "Hinge",
    "model.rpn.reg_loss": "Log",
    "model.roi.matcher": "Halves",
    "model.roi.sampler": "First",
    "model.roi.coder": "Corners",
    "model.roi.coder.unit": 8,
    "model.roi.cls_loss": "Smooth",
    "model.roi.reg_loss": "Log",
    "model.roi.nms": "Best",
    "model.optimizer": "RMS",
    "model.optimizer.schedule": "Slow",
}
ARGUMENTS = {"width": 12, "sides": [16.0, 32.0], "alpha": 0.9, "number": 3, "power": 0.5}


def test_every_part_is_trained_resumed_and_evaluated(tmp_path, tiny_config, frcnn) -> None:
    module = "parts_of_mine"
    shutil.copy(PARTS, tmp_path / f"{module}.py")
    words = [
        word
        for option, value in OPTIONS.items()
        for word in (f"--{option}", f"{module}.{value}" if str(value)[0].isupper() else value)
    ]
    common = ["--trainer.limit_val_batches", 1]
    fitted = frcnn(
        "fit",
        "--config",
        tiny_config,
        *words,
        *common,
        "--trainer.max_epochs",
        9,
        "--trainer.max_steps",
        2,
        cwd=tmp_path,
    )
    assert fitted.code == 0, fitted.err
    run = tmp_path / "runs" / "tiny" / "seed0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    named = flat_options(config["model"])
    paths = {key: value for key, value in named.items() if key.endswith("class_path")}
    assert sorted(paths.values()) == sorted(f"{module}.{v}" for v in OPTIONS.values() if str(v)[0].isupper())
    given = {key.rpartition(".")[2]: value for key, value in named.items() if ".init_args." in key}
    assert {key: given[key] for key in ARGUMENTS} == ARGUMENTS
    assert (named["rpn.matcher.init_args.iou"], named["roi.matcher.init_args.iou"]) == (0.3, 0.5)
    assert (named["rpn.coder.init_args.unit"], named["roi.coder.init_args.unit"]) == (16.0, 8.0)

    checkpoint = run / "checkpoints" / "last.ckpt"
    evaluated = frcnn("validate", "--ckpt_path", checkpoint, cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    again = ["fit", "--config", run / "config.yaml", "--ckpt_path", checkpoint, "--trainer.max_steps", 3]
    resumed = frcnn(*again, cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    other = frcnn(*again, "--trainer.max_steps", 4, "--model.roi.coder.unit", 4, cwd=tmp_path)
    assert other.code == 2
    assert "model.roi.coder.init_args.unit: 8.0 in the checkpoint, 4.0 from here on" in other.err

    (tmp_path / f"{module}.py").unlink()
    sys.modules.pop(module, None)
    image = next((Path(config["data"]["root"]) / "JPEGImages").iterdir())
    missing = frcnn("predict", "--ckpt_path", checkpoint, "--images", image, "--output", "out", cwd=tmp_path)
    assert missing.code == 2
    assert f"backbone.name {module}.Tiny: No module named '{module}' (looked for in the current folder" in missing.err


def test_parts_in_a_config_file(tmp_path, tiny_config, frcnn) -> None:
    shutil.copy(PARTS, tmp_path / "parts_in_yaml.py")
    content = yaml.safe_load(tiny_config.read_text())
    loss = {"class_path": "parts_in_yaml.Log", "init_args": {"factor": 3}}
    content["model"].setdefault("roi", {})["reg_loss"] = loss
    content["model"].setdefault("rpn", {})["sampler"] = "parts_in_yaml.First"
    tiny = {"class_path": "parts_in_yaml.Tiny", "init_args": {"width": 12}}
    content["model"]["backbone"] = tiny | {"weights": "none", "frozen_stages": 0, "box_head": "two_fc"}
    content["model"]["anchors"] = "parts_in_yaml.Squares"
    content["model"]["optimizer"] = {"class_path": "parts_in_yaml.RMS", "lr": 0.001}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    options = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0, "--model.anchors.sides", "[16,24]")
    result = frcnn("fit", "--config", "mine.yaml", *options, cwd=tmp_path)
    assert result.code == 0, result.err
    model = yaml.safe_load((tmp_path / "runs" / "mine" / "seed0" / "config.yaml").read_text())["model"]
    assert model["roi"]["reg_loss"] == {"class_path": "parts_in_yaml.Log", "init_args": {"factor": 3.0}}
    assert model["rpn"]["sampler"]["class_path"] == "parts_in_yaml.First"
    assert model["backbone"]["name"] == tiny
    assert model["backbone"]["box_head"] == "two_fc" and model["optimizer"]["lr"] == 0.001
    assert model["anchors"]["generator"]["init_args"] == {"sides": [16.0, 24.0]}
    assert model["optimizer"]["name"] == {"class_path": "parts_in_yaml.RMS", "init_args": {"alpha": 0.9}}


def test_a_wrong_part_in_a_config_file_is_one_line(tmp_path, tiny_config, frcnn) -> None:
    content = yaml.safe_load(tiny_config.read_text())
    content["model"]["backbone"] = {"class_path": "nowhere.Net"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    result = frcnn("fit", "--config", "mine.yaml", cwd=tmp_path)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "model.backbone.name nowhere.Net: No module named 'nowhere'" in result.err


def test_a_grid_over_parts_and_its_reports(tmp_path, tiny_config, frcnn) -> None:
    """Two cells; the columns of TensorBoard, of the report and of the comparison are the option and its arguments."""
    shutil.copy(PARTS, tmp_path / "parts_of_cells.py")
    shutil.copy(tiny_config, tmp_path / "tiny.yaml")
    log = {"class_path": "parts_of_cells.Log", "init_args": {"factor": 3}}
    tiny = {"class_path": "parts_of_cells.Tiny", "init_args": {"width": 12}}
    grid = {
        "base": "tiny.yaml",
        "axes": {
            "loss": {"option": "model.roi.reg_loss", "values": ["smooth_l1", log]},
            "net": {"option": "model.backbone", "values": [tiny]},
        },
        "seeds": [0],
        "overrides": {"trainer.max_steps": 1, "trainer.limit_val_batches": 2},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    done = frcnn("ablate", "grid.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    runs = sorted((tmp_path / "runs" / "grid").glob("loss=*"))
    assert [run.name.partition(",")[0] for run in runs] == ["loss=Log-factor3", "loss=smooth_l1"]
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    assert config["model"]["backbone"]["name"] == tiny

    table = frcnn("report", "runs/grid", cwd=tmp_path)
    assert table.code == 0 and "Log-factor3" in table.out and "class_path" not in table.out, table.err
    compared = frcnn("compare", *runs[::-1], cwd=tmp_path)
    assert compared.code == 0, compared.err
    lines = [line.split() for line in compared.out.splitlines()]
    assert ["model.roi.reg_loss", "A", "smooth_l1", "B", "parts_of_cells.Log"] in lines
    assert "class_path" not in compared.out and "object at 0x" not in compared.out


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["gou"], "reg_loss gou: must be smooth_l1 or iou or giou or diou or ciou or a class path such as"),
        (["nowhere.Loss"], "reg_loss nowhere.Loss: No module named 'nowhere' (looked for in the current folder"),
        (["wrong_parts.Nothing"], "reg_loss wrong_parts.Nothing: module 'wrong_parts' has no attribute 'Nothing'"),
        (["wrong_parts.First"], "reg_loss wrong_parts.First: is not a class that inherits from BoxLoss"),
        (["wrong_parts.Log", "--model.roi.reg_loss.fctor", 1], "reg_loss wrong_parts.Log: has no argument fctor"),
        (["wrong_parts.Log", "--model.roi.reg_loss.factor", "x"], "reg_loss.factor x: must be a number"),
    ],
)
def test_a_wrong_part_is_one_line_before_data_is_read(options, wanted, tmp_path, tiny_config, frcnn) -> None:
    shutil.copy(PARTS, tmp_path / "wrong_parts.py")
    (tmp_path / "no_data").mkdir()
    arguments = ("--config", tiny_config, "--data.root", "no_data", "--model.roi.reg_loss", *options)
    result = frcnn("fit", *arguments, cwd=tmp_path)
    assert result.code == 2
    assert wanted in result.err.strip().splitlines()[-1]
    assert "Traceback" not in result.err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--model.backbone timm --model.backbone.model x", "--model.backbone.name timm --model.backbone.model x"),
        ("--model.backbone=a.B --model.backbone.w 1", "--model.backbone.name=a.B --model.backbone.name.w 1"),
        ("--model.backbone.name a.B --model.backbone.w 1", "--model.backbone.name a.B --model.backbone.name.w 1"),
        ("--model.backbone a.B --model.backbone.weights w", "--model.backbone.name a.B --model.backbone.weights w"),
        ("--model.anchors a.B", "--model.anchors.generator a.B"),
        ("--model.optimizer adamw --model.optimizer.lrr 1", "--model.optimizer.name adamw --model.optimizer.lrr 1"),
        ("--model.backbone {name:small_c4}", "--model.backbone {name:small_c4}"),
        (
            "--model.backbone={class_path:B} --model.backbone.w 1",
            "--model.backbone.name={class_path:B} --model.backbone.name.w 1",
        ),
    ],
)
def test_sections_take_a_name_themselves(given: str, expected: str) -> None:
    assert with_whole_names(given.split()) == expected.split()


def test_names_of_cells() -> None:
    assert label_of("my_package.losses.Wing") == "Wing"
    assert (
        label_of({"class_path": "my_package.Wing", "init_args": {"omega": 5, "sides": [1, 2]}})
        == "Wing-omega5-sides1-2"
    )
    assert label_of("weights/best.pth") == "weights_best.pth"
