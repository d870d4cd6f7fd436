"""A training that diverges ends there, and leaves no checkpoint that holds NaN; nothing detects with one."""

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.local_launcher import LocalLauncher

FIRST_LINE = re.compile(
    r"frcnn: the loss of step (\d+) is not finite: (.*loss_rpn_cls .*loss_roi_reg .*); images: (\w+\.jpg), (\w+\.jpg); "
)


def checkpoints(cwd: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cwd.glob("runs/tiny/*/checkpoints/*")}


def test_a_huge_rate_stops_at_the_first_bad_loss(frcnn, tiny_config, mini_voc, tmp_path):
    fit = ("fit", "--config", tiny_config, "--model.optimizer.warmup_steps", 0)
    result = frcnn(*fit, "--model.optimizer.lr", 1e20, cwd=tmp_path)
    assert result.code == 1
    match = FIRST_LINE.match(result.err.splitlines()[-1])
    assert match is not None
    step, losses, *images = match.groups()
    assert int(step) in (2, 3)
    assert "nan" in losses or "inf" in losses
    names = {f"{name}.jpg" for name in (mini_voc / "ImageSets" / "Main" / "train.txt").read_text().split()}
    assert set(images) <= names
    assert checkpoints(tmp_path) == {}
    assert list(tmp_path.rglob("metrics.json")) == []


def test_checkpoints_of_before_stay(frcnn, tiny_config, tmp_path):
    assert frcnn("fit", "--config", tiny_config, cwd=tmp_path).code == 0
    before = checkpoints(tmp_path)
    assert set(before) == {"best.ckpt", "last.ckpt"}
    last = tmp_path / "runs" / "tiny" / "seed0" / "checkpoints" / "last.ckpt"
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last, "--trainer.max_epochs", 3)
    fit = (*fit, "--resume_changed", "true", "--model.optimizer.schedule", "constant")
    assert frcnn(*fit, "--model.optimizer.lr", 1e20, cwd=tmp_path).code == 1
    assert checkpoints(tmp_path) == before


class BadGradient(pl.Callback):
    """NaN in one gradient of a step, whose loss is well."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step - 1:
            pl_module.model.rpn.head.deltas.bias.grad[1] = torch.nan


@pytest.mark.parametrize("batches", [1, 2], ids=["", "accumulated"])
def test_a_bad_gradient_stops_at_its_step_and_is_replayed(frcnn, tiny_config, tmp_path, with_callback, batches):
    """Neither the current nor the averaged weights are reached; the dump gives the same losses, to the bit."""
    with_callback(BadGradient(3))
    fit = ("fit", "--config", tiny_config, "--trainer.accumulate_grad_batches", batches)
    result = frcnn(*fit, cwd=tmp_path)
    assert result.code == 1
    assert "the gradient of step 3 is not finite, first of model.rpn.head.deltas.bias; loss_rpn_cls " in result.err
    assert "frcnn replay runs/tiny/seed0/nonfinite_step3.pt runs it again" in result.err
    assert checkpoints(tmp_path) == {}
    assert list(tmp_path.rglob("metrics.json")) == []
    again = frcnn("replay", "runs/tiny/seed0/nonfinite_step3.pt", cwd=tmp_path)
    assert again.code == 0, again.err
    assert again.out.count("backward: all gradients are finite") == batches  # the callback is not there
    rows = re.findall(r"loss\w* +│ +([\d.e-]+) +│ +([\d.e-]+) ", again.out)
    assert len(rows) == 5 * batches
    assert all(before == after for before, after in rows)


def test_steps_are_left_out_where_that_is_asked_for(frcnn, tiny_config, tmp_path, with_callback):
    class SeveralBad(BadGradient):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step + 1 in (2, 4):
                pl_module.model.rpn.head.deltas.bias.grad[1] = torch.nan

    with_callback(SeveralBad(0))
    fit = ("fit", "--config", tiny_config, "--model.optimizer.skip_nonfinite")
    result = frcnn(*fit, 1, "--run_name", "one", cwd=tmp_path)
    assert (result.code, "the gradient of step 4 " in result.err) == (1, True)
    assert frcnn(*fit, 2, "--run_name", "two", cwd=tmp_path).code == 0
    (file,) = (tmp_path / "runs" / "tiny" / "two").glob("events.out.tfevents.*")
    skipped = EventAccumulator(str(file)).Reload().Scalars("weights/skipped_steps")
    assert [(event.step, event.value) for event in skipped] == [(2, 1.0), (4, 2.0)]


class BadWeight(pl.Callback):
    """A weight that a step itself spoils, such as by a rate that is too large for its gradient."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.model.rpn.head.deltas.bias[1] = torch.nan


@pytest.mark.parametrize("validations", [1, 3], ids=["before validation", "before saving"])
def test_bad_weights_of_an_epochs_last_step_are_not_saved(frcnn, tiny_config, tmp_path, with_callback, validations):
    """No loss follows that would tell."""
    with_callback(BadWeight(6))
    fit = ("fit", "--config", tiny_config, "--trainer.check_val_every_n_epoch", validations)
    result = frcnn(*fit, cwd=tmp_path)
    assert result.code == 1
    assert "the weights are not finite after step 6, first model.rpn.head.deltas.bias" in result.err
    assert checkpoints(tmp_path) == {}


def test_bad_weights_of_the_last_step_of_a_training_that_saves_nothing(frcnn, tiny_config, tmp_path, with_callback):
    with_callback(BadWeight(3))
    limits = ("--trainer.max_steps", 3, "--trainer.limit_val_batches", 0, "--trainer.enable_checkpointing", "false")
    result = frcnn("fit", "--config", tiny_config, *limits, cwd=tmp_path)
    assert result.code == 1
    assert "the weights are not finite after step 3" in result.err
    assert list(tmp_path.rglob("metrics.json")) == []


@pytest.fixture(scope="module")
def spoilt(trained, tmp_path_factory) -> Path:
    """A checkpoint of which one weight is infinite."""
    content: dict[str, Any] = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["state_dict"]["model.rpn.head.conv.weight"][1, 2, 0, 0] = torch.inf
    path: Path = tmp_path_factory.mktemp("spoilt") / "last.ckpt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_weights_that_are_not_finite_are_refused(frcnn, tiny_config, mini_voc, spoilt, tmp_path, command):
    options: tuple[object, ...] = ("--config", tiny_config)
    if command == "predict":
        options = ("--images", mini_voc / "JPEGImages", "--output", "out")
    if command == "fit":
        options = (*options, "--trainer.max_epochs", 15)
    result = frcnn(command, *options, "--ckpt_path", spoilt, cwd=tmp_path)
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert f"{spoilt}: its weights are not finite, first model.rpn.head.conv.weight" in line
    assert list(tmp_path.rglob("predictions.json")) == []


def test_a_grids_cell_fails_with_the_line_as_its_reason(tiny_config, tmp_path):
    folder = CellFolder(tmp_path / "runs" / "grid" / "cell")
    options = {"config": tiny_config, "model.optimizer.lr": 1e20, "model.optimizer.warmup_steps": 0}
    where = {"runs_dir": tmp_path / "runs", "experiment": "grid", "run_name": "cell"}
    stage = ["fit", *(f"--{key}={value}" for key, value in {**options, **where}.items())]
    state = {"name": "cell", "axes": {}, "seed": 0, "hash": "0", "status": "pending", "stages": [stage]}
    folder.create(state | {"cwd": str(tmp_path)})
    LocalLauncher([{"OMP_NUM_THREADS": "1"}]).run([folder])
    state = folder.read()
    assert (state["status"], state["exit_code"]) == ("failed", 1)
    assert FIRST_LINE.match(state["error"].splitlines()[-1])
