"""`frcnn fit --model.training_scheme alternating`: one command, one run folder, interrupted anywhere, two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.run.lightning_cli import DetectorCLI

# Three epochs of six optimiser steps; the four steps end after 4, 9, 14 and 18.
SCHEME = ("--model.training_scheme", "alternating", "--model.alternating.step_shares", "[4, 5, 5, 4]")
OPTIONS = (*SCHEME, "--trainer.max_epochs", "3", "--model.image.shortest_side", "[48, 64]")
ENDS = [4, 9, 14, 18]
STEP_OF = [1] * 4 + [2] * 5 + [3] * 5 + [4] * 4

AGREEING = """
import sys
import pytorch_lightning as pl
import torch
from experiments.cli import main
from experiments.run.lightning_cli import DetectorCLI

class Agree(pl.Callback):
    '''Processes have equal weights after every step, though each saw other images.'''
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        both = pl_module.all_gather(weights)
        assert torch.equal(both[0], both[1]), f"step {pl_module.alternating.step}"
        losses = pl_module.all_gather(outputs["loss"].detach())
        assert losses[0] != losses[1]

callbacks = DetectorCLI._callbacks
DetectorCLI._callbacks = lambda self, config: [Agree(), *callbacks(self, config)]
sys.exit(main(sys.argv[1:]))
"""


class Terminate(pl.Callback):
    """SIGTERM in the optimiser step after `done` steps, or in a validation after them."""

    def __init__(self, done: int, in_validation: bool = False) -> None:
        self.done, self.in_validation = done, in_validation

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.done - 1 and not self.in_validation:
            signal.raise_signal(signal.SIGTERM)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.done and self.in_validation and batch_idx == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def undisturbed(frcnn, tiny_config, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    result = frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=cwd)
    assert result.code == 0, result.err
    return cwd / "runs" / "tiny" / "seed0"


def load(run: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def interrupt(frcnn, tiny_config, cwd, with_callback, callback: pl.Callback) -> Path:
    """The run folder of an interrupted training."""
    with_callback(callback)
    assert frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=cwd).code != 0
    with_callback(None)
    return Path(cwd / "runs" / "tiny" / "seed0")


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


# ---- one run ----


def test_losses_of_each_step_and_its_number(undisturbed):
    events = EventAccumulator(str(min(undisturbed.glob("events.out.tfevents.*")))).Reload()
    number = {event.step: event.value for event in events.Scalars("train/alternating_step")}
    assert [number[step] for step in range(18)] == STEP_OF
    for names, steps in ((("rpn_cls", "rpn_reg"), (1, 3)), (("roi_cls", "roi_reg"), (2, 4))):
        for name in names:
            found = [event.step for event in events.Scalars(f"train/loss_{name}")]
            assert found == [index for index, step in enumerate(STEP_OF) if step in steps]
    assert len(events.Scalars("train/loss")) == 18
    # Validations after 6, 12 and 18 optimiser steps: in steps 2, 3 and 4, each of a network that detects.
    assert [e.step for e in events.Scalars("val/AP50_voc07")][:3] == [5, 11, 17]
    assert [e.step for e in events.Scalars("val/proposal_recall@30")][:3] == [5, 11, 17]


def test_first_step_is_validated_by_its_proposals_alone(frcnn, tiny_config, tmp_path, metrics_of):
    """Epochs end in steps 1 and 4."""
    shares = ("--model.alternating.step_shares", "[9, 1, 1, 1]", "--trainer.max_epochs", "2")
    assert frcnn("fit", "--config", tiny_config, *SCHEME, *shares, cwd=tmp_path).code == 0
    run = tmp_path / "runs" / "tiny" / "seed0"
    events = EventAccumulator(str(min(run.glob("events.out.tfevents.*")))).Reload()
    assert [e.step for e in events.Scalars("val/proposal_recall@30")][:2] == [5, 11]
    assert {e.step for e in events.Scalars("val/AP50_voc07")} == {11}
    assert metrics_of(run)["val/proposal_recall@30"] > 0
    assert load(run, "best")["global_step"] == 12


def test_best_checkpoint_is_of_the_last_step(undisturbed, frcnn, tiny_config, tmp_path):
    assert load(undisturbed, "best")["alternating"] == {"step": 4, "ends": ENDS}
    result = frcnn(
        *("fit", "--config", tiny_config, *SCHEME, "--trainer.max_epochs", 2, "--run_name", "short"),
        *("--trainer.limit_train_batches", 5, "--trainer.check_val_every_n_epoch", 1),
        *("--model.alternating.step_shares", "[1, 1, 3, 5]"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    assert load(tmp_path / "runs" / "tiny" / "short", "best")["global_step"] == 10  # at 5, the end of step 3, none


def test_final_checkpoint_is_as_one_of_joint_training(undisturbed, trained, frcnn, tiny_config, mini_voc, tmp_path):
    ours, joint = load(undisturbed), load(trained)
    for part in ("state_dict", "current_model_state"):
        assert ours[part].keys() == joint[part].keys()
    before = json.loads((undisturbed / "metrics.json").read_text())
    # Evaluated by the options of joint training, it gives the numbers of the training.
    result = frcnn(
        *("test", "--config", tiny_config, "--model.image.shortest_side", "[48, 64]"),
        *("--ckpt_path", copy_of(undisturbed, tmp_path), "--data.test_splits", "[odd]"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    (written,) = tmp_path.rglob("metrics.json")
    after = json.loads(written.read_text())
    assert before["val/proposal_recall@30"] > 0
    for name, value in before.items():
        if name.startswith("val/") and not name.startswith("val/loss"):  # a test has no losses
            assert after[name.replace("val/", "test/", 1)] == value
    image = next((mini_voc / "JPEGImages").iterdir())
    options = ("--images", image, "--output", tmp_path / "out", "--score_threshold", 0.01)
    result = frcnn("predict", "--ckpt_path", last(undisturbed), *options, "--accelerator", "cpu", cwd=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "predictions.json").is_file()


def copy_of(run: Path, folder: Path) -> Path:
    copy = folder / "copy.ckpt"
    copy.write_bytes(last(run).read_bytes())
    return copy


def test_options_are_in_the_config_and_the_hyperparameters(undisturbed):
    saved = yaml.safe_load((undisturbed / "config.yaml").read_text())["model"]
    assert saved["training_scheme"] == "alternating"
    assert saved["alternating"] == {
        "step_shares": [4.0, 5.0, 5.0, 4.0],
        "restart_backbone": True,
        "restart_rpn": True,
    }
    hyperparameters = load(undisturbed)["hyper_parameters"]
    assert hyperparameters["training_scheme"] == "alternating"
    assert hyperparameters["alternating"] == saved["alternating"]


# ---- interrupted and resumed ----


def assert_same_end(run: Path, undisturbed: Path) -> None:
    theirs, ours = load(undisturbed), load(run)
    for part in ("state_dict", "current_model_state"):
        assert theirs[part].keys() == ours[part].keys()
        assert [name for name, tensor in theirs[part].items() if not torch.equal(tensor, ours[part][name])] == []
    assert ours["alternating"] == theirs["alternating"] == {"step": 4, "ends": ENDS}
    assert ours["global_step"] == 18
    states = (content["optimizer_states"][0]["state"] for content in (theirs, ours))
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    numbers = [json.loads((folder / "metrics.json").read_text()) for folder in (undisturbed, run)]
    assert {k: v for k, v in numbers[0].items() if k.startswith("val/")} == {
        k: v for k, v in numbers[1].items() if k.startswith("val/")
    }
    assert load(run, "best")["global_step"] == load(undisturbed, "best")["global_step"]
    assert [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize(
    ("done", "step"),
    [(3, 1), (4, 1), (8, 2), (11, 3), (14, 3), (16, 4)],
    ids=["in step 1", "after step 1", "in step 2", "in step 3", "after step 3", "in step 4"],
)
def test_resumed_run_ends_bit_for_bit_as_undisturbed(
    frcnn, tiny_config, tmp_path, undisturbed, with_callback, done, step
):
    run = interrupt(frcnn, tiny_config, tmp_path, with_callback, Terminate(done))
    content = load(run)
    assert (content["global_step"], content["alternating"]["step"]) == (done, step)
    assert any(name.startswith("alternating.") for name in content["state_dict"]) == (step < 3)
    result = frcnn("fit", "--config", tiny_config, *OPTIONS, "--ckpt_path", last(run), cwd=tmp_path)
    assert result.code == 0, result.err
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("done", [6, 12], ids=["in step 2", "in step 3"])
def test_interrupt_during_validation(frcnn, tiny_config, tmp_path, undisturbed, with_callback, done):
    run = interrupt(frcnn, tiny_config, tmp_path, with_callback, Terminate(done, in_validation=True))
    assert load(run)["global_step"] == done
    result = frcnn("fit", "--config", tiny_config, *OPTIONS, "--ckpt_path", last(run), cwd=tmp_path)
    assert result.code == 0, result.err
    assert_same_end(run, undisturbed)


# ---- checkpoints between the steps ----


@pytest.fixture(scope="module")
def in_step_2(frcnn, tiny_config, tmp_path_factory) -> Path:
    """The run folder of a training that was interrupted after 8 optimiser steps."""
    cwd = tmp_path_factory.mktemp("step2")
    with pytest.MonkeyPatch.context() as patch:
        original = DetectorCLI._callbacks
        patch.setattr(DetectorCLI, "_callbacks", lambda self, config: [Terminate(8), *original(self, config)])
        assert frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=cwd).code == 128 + signal.SIGTERM
    return cwd / "runs" / "tiny" / "seed0"


def refusal(result) -> str:
    assert result.code == 2, result
    (line,) = [line for line in result.err.splitlines() if line.startswith("frcnn: ")]
    return str(line)


def test_checkpoint_with_two_networks_is_validated_and_does_not_predict(in_step_2, frcnn, tmp_path, mini_voc):
    result = frcnn("validate", "--ckpt_path", last(in_step_2), cwd=in_step_2.parents[2])
    assert result.code == 0, result.err
    metrics = json.loads((in_step_2 / "metrics.json").read_text())
    assert metrics["val/proposal_recall@30"] > 0
    assert "val/AP50_voc07" in metrics
    options = ("--images", mini_voc / "JPEGImages", "--output", tmp_path / "out")
    line = refusal(frcnn("predict", "--ckpt_path", last(in_step_2), *options, cwd=tmp_path))
    assert "last.ckpt: is of step 2 of an alternating training" in line


def test_going_on_by_another_scheme_is_refused(in_step_2, trained, frcnn, tiny_config, tmp_path):
    joint = ("--model.training_scheme", "joint")
    line = refusal(frcnn("fit", "--config", tiny_config, *joint, "--ckpt_path", last(in_step_2), cwd=tmp_path))
    assert "last.ckpt: was trained by training_scheme alternating" in line
    checkpoint = copy_of(trained, tmp_path)
    line = refusal(frcnn("fit", "--config", tiny_config, *OPTIONS, "--ckpt_path", checkpoint, cwd=tmp_path))
    assert "copy.ckpt: was trained by training_scheme joint" in line


def test_going_on_by_other_steps_is_refused(in_step_2, frcnn, tiny_config, tmp_path):
    longer = (*OPTIONS, "--trainer.max_epochs", 6)
    line = refusal(
        frcnn("fit", "--config", tiny_config, *longer, "--ckpt_path", copy_of(in_step_2, tmp_path), cwd=tmp_path)
    )
    assert "copy.ckpt: the steps of its alternating training end at [4, 9, 14, 18] optimiser steps" in line
    assert "here at [8, 18, 28, 36]" in line


# ---- bad options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.training_scheme", "alternate"), "training_scheme"),
        ((*SCHEME, "--model.alternating.step_shares", "[1, 2, 3]"), "alternating.step_shares: [1.0, 2.0, 3.0] has 3"),
        ((*SCHEME, "--model.alternating.step_shares", "[1, 0, 1, 1]"), "must be positive numbers"),
        ((*SCHEME, "--trainer.max_steps", 2), "train longer"),
    ],
)
def test_bad_options(frcnn, tiny_config, tmp_path, options, message):
    assert message in refusal(frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path))


# ---- two processes ----


@pytest.mark.timeout(200)
def test_two_processes_agree_in_every_step(frcnn, tiny_config, tmp_path):
    """Twelve images, two processes, two images each: three optimiser steps an epoch, twelve in all."""
    script = tmp_path / "agreeing.py"
    script.write_text(AGREEING)
    process = subprocess.run(
        [
            *(sys.executable, str(script), "fit", "--config", str(tiny_config), "--data.eval_batch_size", "1"),
            *("--model.training_scheme", "alternating", "--trainer.max_epochs", "4", "--trainer.strategy", "ddp"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "2"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    run = tmp_path / "runs" / "tiny" / "seed0"
    content = load(run)
    assert content["alternating"] == {"step": 4, "ends": [3, 6, 9, 12]}
    assert not any(name.startswith("alternating.") for name in content["state_dict"])
    before = json.loads((run / "metrics.json").read_text())
    assert before["step"] == 12
    result = frcnn(
        "validate", "--ckpt_path", last(run), "--trainer.devices", 1, "--trainer.strategy", "auto", cwd=tmp_path
    )
    assert result.code == 0, result.err
    after = json.loads((run / "metrics.json").read_text())
    assert {k: v for k, v in after.items() if k.startswith("val/")} == {
        k: v for k, v in before.items() if k.startswith("val/")
    }
