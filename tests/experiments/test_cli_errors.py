"""Bad input ends with exit code 2 and one line that names what is wrong; images without objects are no bad input."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml


@pytest.fixture
def complaint(frcnn, tmp_path):
    """Run a command that must be refused, and return its one line."""

    def run(*arguments, cwd=tmp_path):
        result = frcnn(*arguments, cwd=cwd)
        return check(result)

    return run


def check(result) -> str:
    assert result.code == 2, result
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("frcnn")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("frcnn: ")
    return lines[0]


@pytest.fixture
def copied(mini_voc, tmp_path) -> Path:
    """A copy of the dataset that a test may spoil."""
    return Path(shutil.copytree(mini_voc, tmp_path / "copied"))


def first_of(dataset: Path, split: str) -> str:
    return (dataset / "ImageSets" / "Main" / f"{split}.txt").read_text().split()[0]


def truncate(dataset: Path, stem: str) -> Path:
    path = dataset / "JPEGImages" / f"{stem}.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


# ---- the command itself ----


def test_help_lists_the_commands(frcnn, tmp_path):
    result = frcnn("--help", cwd=tmp_path)
    assert result.code == 0
    assert result.err == ""
    for command in ("fit", "validate", "test", "predict", "mini-voc"):
        assert re.search(rf"^  {command} ", result.out, re.MULTILINE)
        assert frcnn(command, "--help", cwd=tmp_path).code == 0


def test_no_command_is_bad_usage(frcnn, tmp_path):
    result = frcnn(cwd=tmp_path)
    assert result.code == 2
    assert "frcnn COMMAND" in result.out + result.err


def test_unknown_command(complaint):
    assert "'fti'" in complaint("fti", "--config", "x.yaml")


def test_exit_code_and_stderr_of_the_process(frcnn_process, tiny_config, tmp_path):
    process = frcnn_process("fit", "--config", tiny_config, "--data.root", "nowhere", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in out + err
    assert len([line for line in err.splitlines() if line.startswith("frcnn: ")]) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("--help",), ("fit", "--help"), ("anchors",)])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(
    frcnn_process, tiny_config, tmp_path, arguments, buffered
):
    """As of `frcnn anchors | head -1`: 141 is what the shell gives a program that SIGPIPE ended."""
    options = ["--config", tiny_config] if arguments == ("anchors",) else []
    process = frcnn_process(*arguments, *options, cwd=tmp_path, PYTHONUNBUFFERED=buffered)
    process.stdout.close()
    process.stdout = None
    complaints = process.communicate(timeout=120)[1]
    assert "Error" not in complaints and "Exception" not in complaints
    assert process.returncode == 141


def test_only_the_first_process_of_a_run_complains(frcnn, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = frcnn("fti", cwd=tmp_path)
    assert (result.code, result.err) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["predict", "--images", "x.jpg", "--output", "out"], "--ckpt_path"),
        (["predict", "--ckpt_path", "x", "--images", "x.jpg", "--output", "out", "--batchsize", "2"], "--batchsize"),
        (["predict", "--ckpt_path", "x", "--images", "x", "--output", "out", "--batch_size", "two"], "--batch_size"),
        (["predict", "--ckpt_path", "x", "--images", "x", "--output", "out", "--score_threshold", "7"], "7"),
        (
            ["predict", "--ckpt_path", "x" * 300, "--images", "x", "--output", "out"],
            "no file or folder can have a name",
        ),
        (["report", "x" * 300], "no file or folder can have a name that long"),
        (["mini-voc"], "OUT_DIR"),
        (["mini-voc", "out", "--images", "0"], "0"),
    ],
)
def test_bad_usage_of_plain_commands(complaint, arguments, named):
    assert named in complaint(*arguments)


# ---- the configuration ----


def test_missing_config_file(complaint):
    assert "nowhere.yaml" in complaint("fit", "--config", "nowhere.yaml")


def test_config_file_that_is_no_yaml(complaint, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {anchors: [1, 2\ntrainer: }")
    assert "broken.yaml" in complaint("fit", "--config", "broken.yaml")
    assert "broken.yaml" in complaint("fit", "--config=broken.yaml")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": None}, "model: None in a config file is no mapping of options"),
        ({"model": 3}, "model: 3 in a config file is no mapping of options"),
        ({"model": {"backbone": [1]}}, "model.backbone: [1] in a config file is no mapping of options"),
        ({"data": {"root": "9" * 5000}}, "no file or folder can have a name that long"),
        ("model: {}  # caf\xe9", "is no text in UTF-8"),
        (f"seed_everything: {'9' * 5000}", "Exceeds the limit (4300 digits)"),
    ],
)
def test_config_files_that_no_option_can_mean(complaint, tiny_config, tmp_path, changes, named):
    given = changes if isinstance(changes, str) else yaml.safe_dump(yaml.safe_load(tiny_config.read_text()) | changes)
    (tmp_path / "odd.yaml").write_text(given, encoding="latin-1")
    assert named in complaint("fit", "--config", tiny_config, "--config", tmp_path / "odd.yaml")


@pytest.mark.parametrize(("option", "value"), [("model", "3"), ("data", "nowhere.yaml"), ("model.rpn", "[1, 2]")])
def test_section_on_the_command_line_that_is_no_mapping(complaint, tiny_config, option, value):
    said = complaint("fit", "--config", tiny_config, f"--{option}", value)
    assert said.startswith(f"frcnn: --{option} '{value}': is no mapping of options, nor a file of them")


def test_misspelt_key_in_a_config_file(complaint, tiny_config, tmp_path):
    config = yaml.safe_load(tiny_config.read_text())
    config["model"]["anchors"]["scale"] = config["model"]["anchors"].pop("scales")
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    assert "scale" in complaint("fit", "--config", "typo.yaml")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.anchors.scale", "[8]"], "model.anchors.scale"),
        (["--data.batchsize", "4"], "data.batchsize"),
        (["--model.anchors.scales", "many"], "scales"),
        (["--model.optimizer.lr", "fast"], "lr"),
        (["--model.optimizer.lr", "-1"], "lr"),
        (["--trainer.max_epochs", "few"], "max_epochs"),
        (["--trainer.precision", "17"], "precision"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--model.rpn.objectness", "tanh"], "objectness"),
        (["--model.rpn.best_per_object", "two"], "best_per_object"),
        (["--model.roi.append_gt", "maybe"], "append_gt"),
        (["--model.roi.class_weights", "[1, 2]"], "2 numbers for 6 classes; give 7"),
        (["--model.roi.delta_mean", "[0, 0]"], "has 2 numbers, needs 4"),
        (["--model.image.test_shortest_sides", "[4]"], "test_shortest_sides"),
        (["--model.backbone.name", "vgg17"], "vgg17"),
        (["--model.backbone.weights", "missing_weights.pth"], "missing_weights.pth"),
        (["--model.weights", "missing_detector.pth"], "--model.weights missing_detector.pth: no such file"),
        (["--model.backbone.frozen_stages", "2"], "frozen_stages"),
        (["--model.anchors.scales", "[[1], [2], [4]]"], "scales"),
        (["--model.anchors.aspect_ratios", "[]"], "aspect_ratios"),
        (["--model.image.longest_side", "20"], "longest_side"),
        (["--data.augmentation", "twirl"], "twirl"),
        (["--data.root", "no_such_folder"], "no_such_folder"),
        (["--data.train_splits", "[trian]"], "trian.txt"),
        (["--data.val_splits", "[]"], "val_splits"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option(complaint, tiny_config, tmp_path, arguments, named):
    assert named in complaint("fit", "--config", tiny_config, *arguments)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_number_of_anchor_lists_names_both_numbers(complaint, tiny_config):
    line = complaint("fit", "--config", tiny_config, "--model.anchors.scales", "[[1], [2], [4]]")
    assert "3" in line
    assert "1" in line


def test_config_without_data_root(complaint, tiny_config, tmp_path):
    config = yaml.safe_load(tiny_config.read_text())
    del config["data"]["root"]
    (tmp_path / "rootless.yaml").write_text(yaml.safe_dump(config))
    assert "root" in complaint("fit", "--config", "rootless.yaml")


def test_taken_run_name(complaint, tiny_config, tmp_path):
    taken = tmp_path / "runs" / "tiny" / "mine"
    taken.mkdir(parents=True)
    (taken / "metrics.json").write_text("{}")
    assert "runs/tiny/mine" in complaint("fit", "--config", tiny_config, "--run_name", "mine")
    assert (taken / "metrics.json").read_text() == "{}"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_without_a_checkpoint(complaint, tiny_config, command):
    assert "--ckpt_path" in complaint(command, "--config", tiny_config)


# ---- the dataset ----


def test_unknown_class(complaint, tiny_config, mini_voc):
    line = complaint("fit", "--config", tiny_config, "--data.class_names", "[ring, star]")
    assert ".xml" in line
    assert re.search(r"class '(cross|ellipse|rectangle|ring|star|triangle)'", line)


def test_box_with_xmax_below_xmin(complaint, tiny_config, copied):
    path = copied / "Annotations" / f"{first_of(copied, 'train')}.xml"
    path.write_text(re.sub(r"<xmin>\d+</xmin>", "<xmin>999</xmin>", path.read_text(), count=1))
    line = complaint("fit", "--config", tiny_config, "--data.root", copied)
    assert path.name in line
    assert "xmin 999" in line


def test_missing_image(complaint, tiny_config, copied):
    (copied / "JPEGImages" / f"{first_of(copied, 'val')}.jpg").unlink()
    line = complaint("fit", "--config", tiny_config, "--data.root", copied, "--data.val_splits", "[val]")
    assert f"{first_of(copied, 'val')}.jpg" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_found_in_training(complaint, tiny_config, copied, workers):
    path = truncate(copied, first_of(copied, "train"))
    line = complaint("fit", "--config", tiny_config, "--data.root", copied, "--data.num_workers", workers)
    assert str(path) in line
    assert len(line) < 400


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_found_in_validation(complaint, tiny_config, trained, copied, workers):
    path = truncate(copied, first_of(copied, "val"))
    line = complaint(
        "validate",
        *("--config", tiny_config, "--ckpt_path", trained / "checkpoints" / "last.ckpt"),
        *("--data.root", copied, "--data.val_splits", "[val]", "--data.num_workers", workers),
    )
    assert str(path) in line


# ---- the checkpoint ----


@pytest.fixture
def garbage(tmp_path) -> Path:
    path = tmp_path / "garbage.ckpt"
    path.write_bytes(bytes(range(256)) * 20)
    return path


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A file that torch reads, but no checkpoint of a training."""
    path = tmp_path / "foreign.ckpt"
    torch.save({"weight": torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize("kind", ["garbage", "foreign"])
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_unusable_checkpoint(complaint, tiny_config, request, kind, command):
    path = request.getfixturevalue(kind)
    assert path.name in complaint(command, "--config", tiny_config, "--ckpt_path", path)


@pytest.mark.parametrize("kind", ["garbage", "foreign"])
def test_unusable_checkpoint_for_predict(complaint, mini_voc, request, kind):
    path = request.getfixturevalue(kind)
    images = mini_voc / "JPEGImages"
    assert path.name in complaint("predict", "--ckpt_path", path, "--images", images, "--output", "out")


def test_missing_checkpoint_for_predict(complaint, mini_voc):
    line = complaint("predict", "--ckpt_path", "missing.ckpt", "--images", mini_voc / "JPEGImages", "--output", "out")
    assert "missing.ckpt" in line


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_checkpoint_of_other_classes(complaint, tiny_config, trained, mini_voc, copied, command):
    for path in (copied / "Annotations").glob("*.xml"):
        path.write_text(re.sub("<name>(ring|star)</name>", "<name>blob</name>", path.read_text()))
    checkpoint = trained / "checkpoints" / "last.ckpt"
    line = complaint(command, "--config", tiny_config, "--ckpt_path", checkpoint, "--data.root", copied)
    assert str(checkpoint) in line
    assert "6 classes" in line
    assert "5 classes" in line
    assert "blob" in line


def test_checkpoint_of_as_many_classes_with_other_names(complaint, tiny_config, trained, copied):
    for path in (copied / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("<name>ring</name>", "<name>annulus</name>"))
    checkpoint = trained / "checkpoints" / "last.ckpt"
    line = complaint("validate", "--config", tiny_config, "--ckpt_path", checkpoint, "--data.root", copied)
    assert "ring" in line
    assert "annulus" in line


def test_checkpoint_of_another_architecture(complaint, tiny_config, trained):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    line = complaint(
        "validate",
        *("--config", tiny_config, "--ckpt_path", checkpoint),
        *("--model.anchors.scales", "[1, 2, 4]"),
    )
    assert str(checkpoint) in line
    assert "rpn.head" in line
    assert not list(trained.glob("evaluations/anchors*"))


# ---- images to predict on ----


def test_predict_on_a_folder_without_images(complaint, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing to see")
    checkpoint = trained / "checkpoints" / "last.ckpt"
    assert "empty" in complaint("predict", "--ckpt_path", checkpoint, "--images", "empty", "--output", "out")


def test_predict_on_a_missing_path(complaint, trained):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    assert "nowhere" in complaint("predict", "--ckpt_path", checkpoint, "--images", "nowhere", "--output", "out")


# ---- no bad input ----


def without_objects(dataset: Path, stem: str) -> None:
    path = dataset / "Annotations" / f"{stem}.xml"
    path.write_text(re.sub("<object>.*</object>", "", path.read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("empty", [3, 12], ids=["some images", "all images"])
def test_training_images_without_objects(frcnn, tiny_config, copied, tmp_path, empty):
    """With three of twelve images empty some batches are mixed; with all twelve every batch is without objects."""
    stems = (copied / "ImageSets" / "Main" / "train.txt").read_text().split()
    for stem in stems[:empty]:
        without_objects(copied, stem)
    result = frcnn(
        *("fit", "--config", tiny_config, "--data.root", copied, "--data.val_splits", "[val]"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "tiny" / "seed0"
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    losses = [metrics[f"train/{name}"] for name in ("loss", "loss_rpn_cls", "loss_rpn_reg", "loss_roi_cls")]
    assert all(value is not None and math.isfinite(value) for value in losses)
    assert metrics["step"] == 6
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["current_model_state"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
