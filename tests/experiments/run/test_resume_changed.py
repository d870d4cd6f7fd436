"""A training that goes on under other options, or under another name: what changes, what is said, what stays."""

import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from detector.training import progress_line as progress
from detector.training.callbacks import progress as progress_callback
from detector.training.callbacks import throughput

CHANGED = ("--resume_changed", "true")


class StopAfter(pl.Callback):
    """Ask for an end, as SIGTERM does, in the step after so many."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.steps:
            signal.raise_signal(signal.SIGTERM)


def last_of(cwd: Path, name: str = "seed0") -> Path:
    (path,) = cwd.glob(f"runs/*/{name}/checkpoints/last.ckpt")
    return path


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def test_bar_and_clock_after_a_resume_in_the_middle_of_an_epoch(
    frcnn, tiny_config, tmp_path, with_callback, monkeypatch
):
    """Of the second of three epochs, of six steps each, two are done: steps count on from there, and the time that is
    left is that of the steps since then, of a minute each. The clock of images per second starts at the resume."""
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 3, "--trainer.enable_progress_bar", "true")
    with_callback(StopAfter(7))
    assert frcnn(*fit, cwd=tmp_path).code == 143
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(float(trainer.callback_metrics.get("train/images_per_second", math.nan)))
            clock[0] += 60

    clock = [0.0]
    for module in (progress, progress_callback):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: 1000 + clock[0] / 60))
    with_callback(Watch())
    result = frcnn(*fit, "--ckpt_path", last_of(tmp_path), cwd=tmp_path)
    assert result.code == 0
    heads = re.findall(r"^(.* left)  ", result.out, re.MULTILINE)
    assert heads[0] == "0:01:00  epoch 2/3  step 9/18  0:09:00 left"
    assert heads[4] == "0:05:00  epoch 3/3  step 13/18  0:05:00 left"
    assert rates[1] == 2  # two images in a second


@pytest.mark.parametrize("end", ["time", "early stopping"])
def test_training_without_a_length(frcnn, tiny_config, tmp_path, end):
    """Cosine asks for a length before anything is written; a constant rate needs none."""
    fit = ["fit", "--config", tiny_config, "--trainer.max_epochs", -1]
    if end == "time":
        fit += ["--trainer.max_time", "00:00:00:01"]
    else:
        config = tmp_path / "early.yaml"
        options = yaml.safe_load(tiny_config.read_text())
        stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/AP", "mode": "max", "patience": 1}}
        options["trainer"]["callbacks"] = [stop | {"init_args": stop["init_args"] | {"stopping_threshold": -1.0}}]
        config.write_text(yaml.safe_dump(options))
        fit[2] = config
    result = frcnn(*fit, cwd=tmp_path)
    assert result.code == 2
    assert "cosine needs the training's length: give trainer.max_epochs" in result.err
    assert result.err.count("\n") == 1
    fit += ["--model.optimizer.schedule", "constant", "--model.optimizer.warmup_steps", 0]
    result = frcnn(*fit, cwd=tmp_path)
    assert result.code == 0, result.err
    rates = {group["lr"] for group in load(last_of(tmp_path))["optimizer_states"][0]["param_groups"]}
    assert rates == {0.003}


class Rates(pl.Callback):
    """Write down what each step is made with: its number -> the first group's options; optionally stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.groups: dict[int, dict[str, Any]] = {}
        self.stop_after = stop_after

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.groups[trainer.global_step] = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        if trainer.global_step == self.stop_after:
            signal.raise_signal(signal.SIGTERM)

    @property
    def rates(self) -> dict[int, float]:
        return {step: group["lr"] for step, group in self.groups.items()}


def cosine(step: int, steps: int, rate: float = 0.003) -> float:
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


@pytest.fixture(scope="module")
def one_epoch(frcnn, tiny_config, tmp_path_factory) -> Path:
    """Working directory of a finished training of one epoch, six steps; read-only."""
    cwd: Path = tmp_path_factory.mktemp("one_epoch")
    assert frcnn("fit", "--config", tiny_config, cwd=cwd).code == 0
    return cwd


@pytest.fixture
def cwd(one_epoch, tmp_path) -> Path:
    """A copy of `one_epoch` to go on from."""
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_first_step_of_a_longer_training_is_on_its_schedule(frcnn, tiny_config, cwd, with_callback):
    """The last step of the shorter training left the rate at 0."""
    with_callback(rates := Rates())
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last_of(cwd))
    assert frcnn(*fit, "--trainer.max_epochs", 3, cwd=cwd).code == 0
    assert rates.rates == pytest.approx({step: cosine(step, 18) for step in range(6, 18)})


def test_options_of_the_optimizer_take_effect_and_are_said(frcnn, tiny_config, cwd, with_callback, caplog):
    with_callback(rates := Rates())
    options = {"lr": 0.0015, "weight_decay": 0.01, "warmup_steps": 8, "warmup_start": 0.2}
    given = [word for key, value in options.items() for word in (f"--model.optimizer.{key}", value)]
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last_of(cwd), "--trainer.max_epochs", 2)
    given += ["--trainer.gradient_clip_val", 5, "--model.rpn.nms_iou", 0.6]
    assert frcnn(*fit, *given, *CHANGED, cwd=cwd).code == 0
    warmed = {6: 0.2 + 0.8 * 6 / 8, 7: 0.2 + 0.8 * 7 / 8}
    assert rates.rates == pytest.approx({step: warmed.get(step, 1) * cosine(step, 12, 0.0015) for step in range(6, 12)})
    assert rates.groups[6]["weight_decay"] == 0.01
    said = [record.getMessage() for record in caplog.records if "other options" in record.getMessage()]
    assert len(said) == 2
    assert "trainer.gradient_clip_val: None in the checkpoint, 5 from here on" in said[0]
    assert "trainer.max_epochs: 1 in the checkpoint, 2 from here on" in said[0]
    assert "optimizer.lr: 0.003 in the checkpoint, 0.0015 from here on" in said[1]
    assert "rpn.nms_iou: 0.7 in the checkpoint, 0.6 from here on" in said[1]
    assert [text.count("from here on") for text in said] == [2, 5]
    changed = load(last_of(cwd))["hyper_parameters"]["optimizer"]
    assert (changed["lr"], changed["weight_decay"]) == (0.0015, 0.01)
    caplog.clear()  # the next time they are the checkpoint's
    assert frcnn(*fit[:-1], 3, *given, cwd=cwd).code == 0
    (said,) = [record.getMessage() for record in caplog.records if "other options" in record.getMessage()]
    assert said.endswith("seed0: goes on with other options: trainer.max_epochs: 2 in the checkpoint, 3 from here on")


def test_schedule_of_other_batches_ends_with_the_training(frcnn, tiny_config, cwd, with_callback):
    """Two epochs of three steps follow one of six: twelve steps in all, also after a second interruption."""
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 3, "--data.batch_size", 4)
    with_callback(first := Rates(stop_after=9))
    assert frcnn(*fit, "--ckpt_path", last_of(cwd), *CHANGED, cwd=cwd).code == 143
    with_callback(second := Rates())
    assert frcnn(*fit, "--ckpt_path", last_of(cwd), cwd=cwd).code == 0
    assert first.rates | second.rates == pytest.approx({step: cosine(step, 12) for step in range(6, 12)})
    assert (len(first.rates), len(second.rates)) == (4, 2)


def test_accumulation_of_other_numbers_of_batches(frcnn, tiny_config, cwd, with_callback):
    """Six batches in steps of 4 and 2."""
    with_callback(rates := Rates())
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last_of(cwd), "--trainer.max_epochs", 3)
    assert frcnn(*fit, "--trainer.accumulate_grad_batches", 4, *CHANGED, cwd=cwd).code == 0
    assert rates.rates == pytest.approx({step: cosine(step, 10) for step in range(6, 10)})


def test_averaging_switched_off_and_on_again(frcnn, tiny_config, cwd):
    """Without averages the training goes on with its own weights, not with the averages it had."""
    before = load(last_of(cwd))
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last_of(cwd), "--model.optimizer.lr", 1e-12, *CHANGED)
    assert frcnn(*fit, "--trainer.max_epochs", 2, "--model.optimizer.ema_decay", 0, cwd=cwd).code == 0
    after = load(last_of(cwd))
    name = "model.roi_heads.predictor.scores.weight"
    assert "current_model_state" not in after
    assert after["state_dict"][name].allclose(before["current_model_state"][name], atol=1e-6)
    assert not after["state_dict"][name].allclose(before["state_dict"][name], atol=1e-4)
    assert frcnn(*fit, "--trainer.max_epochs", 3, cwd=cwd).code == 0
    assert load(last_of(cwd))["current_model_state"][name].allclose(after["state_dict"][name], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.optimizer.name", "sgd"), "optimizer.name sgd cannot go on from the state of adamw"),
        (
            ("--model.backbone.frozen_stages", 1, "--model.weights", "detector.pth"),
            "model.backbone.frozen_stages: 0 in the checkpoint, 1 from here on); go on with the options of its run",
        ),
        (("--model.anchors.scales", "[1, 2, 4]"), "is of another network than the options of the model"),
        (("--data.class_names", "[ring, star]"), "was trained on 6 classes"),
    ],
)
def test_what_cannot_change_names_the_way_out(frcnn, tiny_config, cwd, options, message):
    last = last_of(cwd)
    before = files(last.parents[1])
    result = frcnn(
        *("fit", "--config", tiny_config, "--ckpt_path", last, "--trainer.max_epochs", 2, "--data.on_error", "skip"),
        *(*options, *CHANGED),
        cwd=cwd,
    )
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert message in line
    assert f"weights {last} instead of ckpt_path" in line
    assert files(last.parents[1])["checkpoints/last.ckpt"] == before["checkpoints/last.ckpt"]


def test_checkpoint_of_weights_alone(frcnn, tiny_config, cwd):
    content = {key: value for key, value in load(last_of(cwd)).items() if key not in ("optimizer_states", "callbacks")}
    torch.save(content, cwd / "weights.ckpt")
    fit = ("fit", "--config", tiny_config, "--ckpt_path", cwd / "weights.ckpt", "--trainer.max_epochs", 2)
    result = frcnn(*fit, cwd=cwd)
    assert result.code == 2
    assert "holds weights and no state of a training" in result.err


def test_new_name_is_a_new_run_from_where_the_checkpoint_stands(frcnn, tiny_config, cwd, with_callback):
    old = last_of(cwd).parents[1]
    before = files(old)
    with_callback(rates := Rates())
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last_of(cwd), "--trainer.max_epochs", 2)
    assert frcnn(*fit, "--run_name", "longer", cwd=cwd).code == 0
    assert files(old) == before
    new = cwd / "runs" / "tiny" / "longer"
    assert list(rates.rates) == [*range(6, 12)]
    assert load(new / "checkpoints" / "last.ckpt")["global_step"] == 12
    assert {path.name for path in (new / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    metrics = json.loads((new / "metrics.json").read_text())
    assert (metrics["epoch"], metrics["step"]) == (2, 12)
    assert not (new / "config_resumed_1.yaml").exists()
    # The new run goes on by itself, and the name is taken now.
    assert frcnn(*fit, "--run_name", "longer", cwd=cwd).code == 2
    goes_on = ("fit", "--config", new / "config.yaml", "--ckpt_path", new / "checkpoints" / "last.ckpt")
    assert frcnn(*goes_on, "--trainer.max_epochs", 3, cwd=cwd).code == 0
    assert (new / "config_resumed_1.yaml").exists()
    assert load(new / "checkpoints" / "last.ckpt")["global_step"] == 18
    assert files(old) == before


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        (("--runs_dir", "elsewhere"), "elsewhere/tiny/seed0"),
        (("--experiment", "other"), "runs/other/seed0"),
        (("--runs_dir", "elsewhere", "--experiment", "other", "--run_name", "a"), "elsewhere/other/a"),
        (("--runs_dir", "runs", "--experiment", "tiny", "--run_name", "seed0"), "runs/tiny/seed0"),
        ((), "runs/tiny/seed0"),
    ],
)
def test_where_a_resumed_run_is(frcnn, tiny_config, cwd, with_callback, options, folder):
    """What is not given is as in the old run; all as there is the old run."""
    with_callback(StopAfter(6))
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last_of(cwd), "--trainer.max_epochs", 2)
    assert frcnn(*fit, *options, cwd=cwd).code == 143
    assert {str(path.relative_to(cwd)) for path in cwd.glob("*/*/*")} == {folder, "runs/tiny/seed0"}
    assert load(cwd / folder / "checkpoints" / "last.ckpt")["global_step"] == 7


def test_moved_run_goes_on_where_it_is_and_keeps_its_best(frcnn, tiny_config, cwd):
    """Its own config file names the place it had; its best checkpoint was of a folder that is gone."""
    options = ("--runs_dir", "first", "--run_name", "a")
    assert frcnn("fit", "--config", tiny_config, *options, cwd=cwd).code == 0
    run = Path(shutil.move(cwd / "first" / "tiny" / "a", cwd / "b"))
    best = load(run / "checkpoints" / "best.ckpt")

    fit = ("fit", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert frcnn(*fit, "--trainer.max_epochs", 2, "--model.roi.score_threshold", 0.9999, *CHANGED, cwd=cwd).code == 0
    assert load(run / "checkpoints" / "last.ckpt")["global_step"] == 12
    assert load(run / "checkpoints" / "best.ckpt")["global_step"] == best["global_step"] == 6
    assert not (cwd / "first" / "tiny" / "a").exists()


@pytest.mark.parametrize("limit", [("--trainer.max_epochs", 1), ("--trainer.max_steps", 6), ("--trainer.max_steps", 4)])
def test_complete_run_is_left_alone(frcnn, tiny_config, cwd, limit):
    before = files(cwd / "runs")
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last_of(cwd), *limit)
    result = frcnn(*fit, cwd=cwd)
    assert result.code in (0, None)
    assert re.search(
        r"this training is complete: --trainer.max_(steps [46]|epochs 1) is reached; to train on", result.err
    )
    assert result.err.count("\n") == 1
    assert frcnn(*fit, "--run_name", "new", cwd=cwd).code == 2
    assert files(cwd / "runs") == before


def test_made_splits_go_along_to_a_new_run(frcnn, tiny_config, tmp_path):
    """The new run trains and validates on the same images, whatever has become of the dataset meanwhile."""
    fit = ("fit", "--config", tiny_config, "--data.train_splits", "[]", "--data.val_splits", "[]")
    fit = (*fit, "--data.val_fraction", 0.3)
    assert frcnn(*fit, cwd=tmp_path).code == 0
    lists = tmp_path / "runs" / "tiny" / "seed0" / "splits"
    names = (lists / "val.txt").read_text().split()
    (lists / "val.txt").write_text("\n".join(names[:-1]) + "\n")  # as if one image had come since
    options = ("--ckpt_path", last_of(tmp_path), "--run_name", "b", "--trainer.max_epochs", 2)
    assert frcnn(*fit, *options, cwd=tmp_path).code == 0
    new = lists.parents[1] / "b" / "splits"
    assert (new / "val.txt").read_text().split() == names[:-1]
    assert {path.name for path in new.iterdir()} == {path.name for path in lists.iterdir()}


def test_start_from_a_checkpoint_on_other_classes(frcnn, tiny_config, one_epoch, tmp_path, caplog):
    """What the message on other classes tells to do works: a new run, with the averaged weights, from step 0."""
    fit = ("fit", "--config", tiny_config, "--data.on_error", "skip", "--data.class_names", "[star, ring]")
    source = last_of(one_epoch)
    result = frcnn(*fit, "--ckpt_path", source, cwd=tmp_path)
    assert result.code == 2
    (advice,) = re.findall(
        r"start a new training from its weights: (weights .*) instead of ckpt_path, with (weights_predictor .*)",
        result.err,
    )
    words = " ".join(advice).split()
    assert words == ["weights", str(source), "weights_predictor", "by_name"]
    words = [f"--model.{word}" if word.startswith("weights") else word for word in words]
    assert frcnn(*fit, *words, "--model.optimizer.lr", 1e-12, cwd=tmp_path).code == 0
    theirs, ours = load(source)["state_dict"], load(last_of(tmp_path))
    assert ours["global_step"] == 6
    names = ["cross", "ellipse", "rectangle", "ring", "star", "triangle"]
    rows = [0, 1 + names.index("star"), 1 + names.index("ring")]
    scores = "model.roi_heads.predictor.scores.weight"
    assert ours["state_dict"][scores].allclose(theirs[scores][rows], atol=1e-6)
    conv = "model.rpn.head.conv.weight"
    assert ours["state_dict"][conv].allclose(theirs[conv], atol=1e-6)
    said = [record.getMessage() for record in caplog.records]
    assert any(f"weights from {source}" in text and "2 of its 6 classes, by name" in text for text in said)
