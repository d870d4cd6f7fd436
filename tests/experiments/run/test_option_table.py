"""The options of a training as they are known without torch: as the parser has them, refused as it refuses them."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentError

from experiments.cli import main
from experiments.run import option_table as module
from experiments.run.option_table import (
    TABLE,
    check_arguments,
    parse_known,
    read_table,
    training_parser,
)
from experiments.run.options import RunOptions
from experiments.run.training_help import FIRST, part_of_help
from experiments.run.training_options import option_table

ROOT = Path(__file__).resolve().parents[3]


def test_the_table_is_what_the_parsers_have() -> None:
    """After a change of an option, `make options` writes it anew."""
    assert json.loads(TABLE.read_text()) == json.loads(json.dumps(option_table()))


def parser(data_format: str = "voc") -> Any:
    return training_parser("fit", RunOptions, data_format)


# ---- what is refused without torch ----


FILES = {
    "misspelt.yaml": {"model": {"backbone": {"nam": "small_c4"}}, "data": {"root": "."}},
    "list.yaml": [1],
    "rootless.yaml": {"model": {"rpn": {"nms_iou": 0.5}}},
    "grid.yaml": {"base": "good.yaml", "axes": {"model.anchors.scale": [[8], [16]]}},
    "values.yaml": {"base": "good.yaml", "axes": {"model.rpn.nms_iou": [0.5, "much"]}},
    "base.yaml": {"base": "misspelt.yaml", "axes": {"model.anchors.scales": [[8], [16]]}},
    "good.yaml": {"data": {"root": "."}},
}
MISSPELT = "misspelt.yaml: there is no option model.backbone.nam; did you mean model.backbone.name?"
BACKBONES = "vgg16 or vgg16_bn or resnet18_c4 or resnet50_c4"
REFUSED = {
    "fit --data.root . --model.backbone.nam vgg16": "--model.backbone.nam vgg16; did you mean --model.backbone.name?",
    "fit --data.root . --modl.backbone.name small_c4": "did you mean --model.backbone.name?",
    "fit --data.root . --lr 0.1": "unrecognized arguments: --lr 0.1; did you mean --model.optimizer.lr?",
    "fit --data.root . --trainer.callback X": "did you mean --trainer.callbacks?",
    "fit --data.root . --model.rpn.zebra 1": "unrecognized arguments: --model.rpn.zebra 1 (frcnn fit --help all",
    "fit --data.root . --data.image_dirs [x]": "unrecognized arguments: --data.image_dirs [x]",
    "fit --data.root . --model.backbone.name resnet50": f"--model.backbone.name resnet50: must be {BACKBONES}",
    "fit --data.root . --model.roi.ohem maybe": "--model.roi.ohem maybe: must be true or false",
    "fit --config misspelt.yaml": MISSPELT,
    "fit --config list.yaml": "Unexpected config: - 1",
    "fit --config broken.yaml": 'Problems parsing config: while parsing a flow sequence in "broken.yaml", line 1',
    "fit --config none.yaml": "--config none.yaml: no such file",
    "fit --config rootless.yaml": "the following arguments are required: --data.root",
    "fit --data.root none": "--data.root none: no such folder; `frcnn mini-voc OUT_DIR` writes",
    "fit --data.root none --data_format coco": "--data.root none: no such folder",
    "fit --data.root . --data_format pascal": "--data_format pascal: there are voc, coco, yolo",
    "fit --data.root . --ckpt_path none.ckpt": "none.ckpt: no such checkpoint file",
    "fit --data.root . --model.weights none.pth": "--model.weights none.pth: no such file; give one",
    "fit --data.root . --model.backbone.weights none.pth": "--model.backbone.weights none.pth: no such file; give one",
    "validate --data.root . --ckpt_path none.ckpt": "none.ckpt: no such checkpoint file",
    "validate --data.root .": "frcnn validate needs --ckpt_path, for example runs/X/seed0/checkpoints/last.ckpt",
    "test --data.root . --clases [a]": "unrecognized arguments: --clases [a]; did you mean --classes?",
    "test --ckpt_path none.ckpt": "none.ckpt: no such checkpoint file",
    "init none": "none: no such folder",
    "report none": "none: no such folder; give the folder of a grid",
    "compare none none": "none: no such folder; give a run folder",
    "tets --ckpt_path none.ckpt": "'tets' is not a command of frcnn; there are",
    "repot runs": "did you mean report?",
    "predict --ckpt_path none.ckpt --images x --output y": "none.ckpt: no such checkpoint file",
    "predict --ckpt_path none.ckpt --image x --output y": "unrecognized arguments: --image x; did you mean --images?",
    "anchors --config misspelt.yaml": "misspelt.yaml: there is no option model.backbone.nam; did you mean",
    "anchors --config good.yaml --sugest 3": "unrecognized arguments: --sugest 3; did you mean --suggest?",
    "show-data --config none.yaml --output x": "--config none.yaml: no such file",
    "ablate grid.yaml": "grid.yaml: cell scale=8,seed=0: unrecognized arguments: --model.anchors.scale=[8]; did",
    "ablate values.yaml": "values.yaml: cell nms_iou=much,seed=0: --model.rpn.nms_iou much: must be a number",
    "ablate base.yaml": MISSPELT,
}


def test_what_is_wrong_is_one_line_before_torch_is_imported(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    (tmp_path / "broken.yaml").write_text("model: {anchors: [1, 2\ntrainer: }")
    program = """
import contextlib, io, json, sys
from experiments.cli import main
def said(command):
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        status = main(command.split())
    return status, text.getvalue(), "torch" in sys.modules
print(json.dumps({command: said(command) for command in json.loads(sys.argv[1])}))
"""
    call = [sys.executable, "-c", program, json.dumps([*REFUSED])]
    ended = subprocess.run(
        call, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    found = json.loads(ended.stdout)
    assert {command: one for command, one in found.items() if one[0] != 2 or one[2] or one[1].count("\n") != 1} == {}
    assert {command: one[1] for command, one in found.items() if REFUSED[command] not in one[1]} == {}


# ---- what is left to the parser of trainings ----


@pytest.mark.parametrize(
    "arguments",
    [
        "--trainer.callbacks+ own.Callback --trainer.callbacks.anything 3 --trainer.callbacks+=EarlyStopping",
        "--trainer.logger CSVLogger --trainer.logger.save_dir here --trainer.logger.init_args.name x",
        "--trainer.strategy ddp --trainer.accelerator cpu --trainer.plugins+ own.Plugin --trainer.profiler simple",
        "--trainer.devices+ 3 --trainer.max_time 00:01:00:00 --trainer.limit_val_batches 0.5 --model.rpn.nms_iou=1e-1",
        "--data.train_splits+ a --data.train_splits+ b --data.augmentation [{class_path:own.Step}]",
        "--model.anchors.scales [[1],[2]] --model.roi.class_weights [1,2] --model.rpn.best_per_object one",
        "--config classes.yaml",
        "--config dotted.yaml --seed_everything true --trainer.precision 16-mixed --trainer.precision 32",
    ],
)
def test_classes_and_all_ways_to_write_values_are_not_refused(arguments: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    classes = {"callbacks": [{"class_path": "own.Callback", "init_args": {"a": 1}}], "logger": False, "profiler": None}
    content = {
        "trainer": classes,
        "data": {"augmentation": [{"class_path": "own.Step"}]},
        "model": {"class_names": ["a"]},
    }
    Path("classes.yaml").write_text(yaml.safe_dump(content))
    Path("dotted.yaml").write_text("model.rpn.nms_iou: 0.5\ndata: {root: there}")
    found = parse_known(parser(), ["--data.root", "there", *arguments.split()])
    assert found is not None and found.data.root == "there"


@pytest.mark.parametrize(
    "arguments",
    [
        "--data data.yaml",
        "--model.rpn rpn.yaml --data.root there",
        "--config parts.yaml",
        "--print_config --config none.yaml",
        "--print_config=skip_default",
        "--trainer.callbacks.help EarlyStopping",
    ],
)
def test_parts_in_files_and_questions_are_left_to_the_parser(arguments: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parts.yaml").write_text("data: data.yaml")
    assert parse_known(parser(), arguments.split()) is None


def test_options_and_values_that_the_code_has_by_now_are_left_to_the_parser(monkeypatch: Any) -> None:
    """The table is older than an edited source: what was added there since is not refused by it."""
    table = json.loads(TABLE.read_text())
    del table["all"]["model.rpn.conv_depth"], table["all"]["trainer.max_steps"], table["voc"]["data.download"]
    table["all"]["model.image.channel_order"][0] = "Literal['rgb']"
    monkeypatch.setattr(module, "read_table", lambda: table)
    older = training_parser.__wrapped__("fit", RunOptions, "voc")
    for option in (
        "model.rpn.conv_depth=2",
        "trainer.max_steps=3",
        "data.download=true",
        "model.image.channel_order=bgr",
    ):
        assert parse_known(older, ["--data.root=there", f"--{option}"]) is None, option
    for option in ("model.rpn.conv_dept=2", "trainer.max_step=3", "rpn.conv_depth=2", "model.image.channel_order=grb"):
        with pytest.raises(ArgumentError):
            parse_known(older, ["--data.root=there", f"--{option}"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/**/*.yaml")), ids=lambda path: path.stem)
def test_no_config_of_the_package_is_refused(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if "axes" not in content:
        assert parse_known(parser(content.get("data_format", "voc")), ["--config", str(path)]) is not None


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "1"), ("FRCNN_AXES", "{}")])
def test_other_devices_and_cells_of_a_grid_check_nothing_again(name: str, value: str, monkeypatch: Any) -> None:
    with pytest.raises(ArgumentError):
        check_arguments(parser(), ["--misspelt", "1"])
    monkeypatch.setenv(name, value)
    check_arguments(parser(), ["--misspelt", "1"])


# ---- --help ----


def help_of(*arguments: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main([*arguments]) == 0
    return text.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("part", [[], ["all"]])
@pytest.mark.parametrize("command", ["fit", "test", "anchors"])
def test_help_fits_the_terminal(command: str, part: list[str], columns: int, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    longest = max(help_of(command, "--help", *part).splitlines(), key=len)
    assert columns * 0.6 < len(longest) <= columns, longest


def test_help_shows_twenty_options_first() -> None:
    text = help_of("fit", "--help")
    shown = re.findall(r"\n  --([\w.]+)", text)
    assert shown == [name for names in FIRST.values() for name in names] and len(shown) == 20
    assert [title for title in FIRST if f"\n{title}:\n" not in text] == []
    assert "(default: 0.001)" in text and "sgd" not in text and "frcnn fit --help all" in text


def test_help_all_shows_every_option_under_its_part() -> None:
    table = read_table()
    for command, data_format in (("fit", "voc"), ("validate", "coco")):
        rows = table["all"] | table[data_format] | table[command]
        text = help_of(command, "--help=all", "--data_format", data_format)
        shown = re.findall(r"\n  --([\w.]+)", text)
        assert len(shown) == len(set(shown))
        assert {name for name, (kind, _, words) in rows.items() if kind and words} - {*shown} == set()
    assert "\nmodel.rpn:\n  Region proposal network\n\n  --model.rpn.head" in text
    assert "--save_devkit_results" not in text and "--model.optimizer.name sgd|adamw|class" in text
    assert "Of frcnn validate alone:\n  --classes" in text


def test_help_of_a_part() -> None:
    shown = re.findall(r"\n  --([\w.]+)", help_of("fit", "--help", "model.alternating"))
    assert shown == [f"model.alternating.{name}" for name in ("step_shares", "restart_backbone", "restart_rpn")]
    assert main(["fit", "--help", "model.zebra"]) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config", "x"], None),
        (["--help"], ""),
        (["-h", "all"], "all"),
        (["--config", "x", "--help=model"], "model"),
        (["--help", "--config", "x"], "--config"),
    ],
)
def test_which_help_is_asked_for(arguments: list[str], part: str | None) -> None:
    assert part_of_help(arguments) == part
