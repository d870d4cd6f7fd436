"""A training that was interrupted anywhere, and resumed, ends as if it had not been: bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

OPTIONS = ("--trainer.max_epochs", "3", "--model.image.shortest_side", "[48, 64]")  # six steps in an epoch

PROCESS = """
import os, signal, sys
import pytorch_lightning as pl
from experiments.cli import main
from experiments.run.lightning_cli import DetectorCLI

class Kill(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGINT)

callbacks = DetectorCLI._callbacks
DetectorCLI._callbacks = lambda self, config: [Kill(), *callbacks(self, config)]
sys.exit(main(sys.argv[1:]))
"""


class Raise(pl.Callback):
    """Raise an exception at the n-th call of a hook (once: a resumed process has other callbacks)."""

    def __init__(self, hook: str, call: int, exception: BaseException) -> None:
        self.calls = 0
        setattr(self, hook, lambda *args, **kwargs: self._count(call, exception))

    def _count(self, call: int, exception: BaseException) -> None:
        self.calls += 1
        if self.calls == call:
            raise exception


@pytest.fixture(scope="module")
def undisturbed(frcnn, tiny_config, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    result = frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=cwd)
    assert result.code == 0, result.err
    return cwd / "runs" / "tiny" / "seed0"


def load(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def resume(frcnn, tiny_config, run: Path) -> None:
    result = frcnn(
        *("fit", "--config", tiny_config, *OPTIONS, "--ckpt_path", run / "checkpoints" / "last.ckpt"),
        cwd=run.parents[2],
    )
    assert result.code == 0, result.err


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """Weights, averaged weights, optimiser, counters and numbers."""
    theirs, ours = load(undisturbed), load(run)
    for part in ("state_dict", "current_model_state"):
        assert theirs[part].keys() == ours[part].keys()
        differing = [name for name, tensor in theirs[part].items() if not torch.equal(tensor, ours[part][name])]
        assert differing == []
    assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"]) == (2, 18)
    for index, state in theirs["optimizer_states"][0]["state"].items():
        assert torch.equal(state["exp_avg_sq"], ours["optimizer_states"][0]["state"][index]["exp_avg_sq"])
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (undisturbed, run))
    before.pop("train/images_per_second")
    after.pop("train/images_per_second", None)
    # A run that was resumed in its last validation has no last training step of its own.
    assert after == {name: value for name, value in before.items() if name in after or not name.startswith("train/")}
    assert json.loads((run / "predictions.json").read_text()) == json.loads(
        (undisturbed / "predictions.json").read_text()
    )
    assert [path.name for path in run.parent.iterdir()] == [run.name]  # no second run folder
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        *("best.ckpt", "last.ckpt", "last-previous.ckpt")
    }
    best = [torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True) for folder in (undisturbed, run)]
    assert best[0]["global_step"] == best[1]["global_step"]


def test_interrupt_key_in_the_middle_of_a_step(tiny_config, frcnn, tmp_path, undisturbed):
    """The step is finished, the checkpoint is of its end, and the exit status is that of a failure; with a worker."""
    process = subprocess.run(
        [sys.executable, "-c", PROCESS, "fit", "--config", str(tiny_config), *OPTIONS, "--data.num_workers=1"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert process.returncode == 130, process.stderr
    assert "Traceback" not in process.stderr
    assert "give ckpt_path runs/tiny/seed0/checkpoints/last.ckpt" in process.stdout + process.stderr
    assert load(run)["global_step"] == 9
    assert not (run / "metrics.json").exists()
    resume(frcnn, tiny_config, run)
    assert_same_end(run, undisturbed)
    assert {"config.yaml", "config_resumed_1.yaml"} <= {path.name for path in run.iterdir()}


def test_termination_in_the_middle_of_a_step(frcnn, tiny_config, tmp_path, undisturbed, with_callback):
    class Terminate(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    with_callback(Terminate())
    assert frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=tmp_path).code == 128 + signal.SIGTERM
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert load(run)["global_step"] == 3
    with_callback(None)
    resume(frcnn, tiny_config, run)
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize(
    ("scheme", "number", "code"),
    [("joint", signal.SIGTERM, 143), ("alternating", signal.SIGTERM, 143), ("joint", signal.SIGINT, 130)],
)
def test_interrupt_between_the_batches_of_a_step(frcnn, tiny_config, tmp_path, with_callback, scheme, number, code):
    """Accumulated gradients are in no checkpoint: the step is finished first. An epoch has steps of 4 and of 2.

    SIGTERM comes in a step's second batch, Ctrl-C in the validation after its third.
    """
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 3, "--trainer.accumulate_grad_batches", 4)
    fit = (*fit, "--model.training_scheme", scheme, "--trainer.val_check_interval", 3, "--trainer.limit_val_batches", 2)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()

    class Signal(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if number == signal.SIGTERM and (trainer.current_epoch, batch_idx) == (1, 1):
                signal.raise_signal(number)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
            if number == signal.SIGINT and (trainer.global_step, batch_idx) == (2, 0) and trainer.current_epoch == 1:
                signal.raise_signal(number)

    assert frcnn(*fit, cwd=tmp_path / "whole").code == 0
    with_callback(Signal())
    assert frcnn(*fit, cwd=tmp_path / "parts").code == code
    with_callback(None)
    whole, parts = (tmp_path / name / "runs" / "tiny" / "seed0" for name in ("whole", "parts"))
    assert load(parts)["global_step"] == 3
    assert frcnn(*fit, "--ckpt_path", parts / "checkpoints" / "last.ckpt", cwd=tmp_path / "parts").code == 0
    theirs, ours = load(whole), load(parts)
    assert ours["global_step"] == theirs["global_step"] == 6
    for state in ("state_dict", "current_model_state"):
        assert [name for name, tensor in theirs[state].items() if not torch.equal(tensor, ours[state][name])] == []


def test_thresholds_that_follow_the_training_go_on(frcnn, tiny_config, tmp_path, with_callback):
    """Dynamic R-CNN's change after every fourth step; the interrupt comes after the third of six."""
    fit = ("fit", "--config", tiny_config, "--trainer.limit_val_batches", 1)
    fit = (*fit, "--model.roi.matcher", "detector.assignment.DynamicMatcher", "--model.roi.matcher.interval", 4)
    fit = (*fit, "--model.roi.matcher.iou_rank", 3)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()

    class Terminate(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    assert frcnn(*fit, cwd=tmp_path / "whole").code == 0
    with_callback(Terminate())
    assert frcnn(*fit, cwd=tmp_path / "parts").code == 143
    with_callback(None)
    whole, parts = (tmp_path / name / "runs" / "tiny" / "seed0" for name in ("whole", "parts"))
    before = load(parts)["current_model_state"]
    assert frcnn(*fit, "--ckpt_path", parts / "checkpoints" / "last.ckpt", cwd=tmp_path / "parts").code == 0
    theirs, ours = load(whole)["current_model_state"], load(parts)["current_model_state"]
    assert [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])] == []
    steps, values = (f"model.roi_heads.matcher.{name}" for name in ("_steps", "_values"))
    assert (int(before[steps]), int(ours[steps])) == (3, 6)
    assert before[values].tolist() == pytest.approx([0.4, 1])
    assert ours[values][0] > 0.4


@pytest.mark.parametrize("call", [2, 10], ids=["first epoch", "last epoch"])
def test_interrupt_during_validation(frcnn, tiny_config, tmp_path, undisturbed, with_callback, call):
    """Four batches a validation. The checkpoint holds the current weights as such, not the averaged ones that the
    validation swapped in, and the resumed run validates on all images."""
    with_callback(Raise("on_validation_batch_end", call, KeyboardInterrupt()))
    assert frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=tmp_path).code == 130
    run = tmp_path / "runs" / "tiny" / "seed0"
    if call == 10:
        theirs, ours = load(undisturbed), load(run)
        for part in ("state_dict", "current_model_state"):
            assert all(torch.equal(tensor, ours[part][name]) for name, tensor in theirs[part].items())
    with_callback(None)
    resume(frcnn, tiny_config, run)
    assert_same_end(run, undisturbed)


def test_interrupt_key_during_validation(frcnn, tiny_config, tmp_path, undisturbed, with_callback):
    class PressKey(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if trainer.global_step == 12 and batch_idx == 1:
                signal.raise_signal(signal.SIGINT)

    with_callback(PressKey())
    assert frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=tmp_path).code == 130
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert load(run)["global_step"] == 12
    with_callback(None)
    resume(frcnn, tiny_config, run)
    assert_same_end(run, undisturbed)


def test_a_signal_before_the_training_whose_exception_is_lost(frcnn, tiny_config, tmp_path, with_callback):
    """Python drops it where it comes while a loader forks its workers; here it is dropped by hand."""

    class Lost(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGTERM)

    with_callback(Lost())
    options = (*OPTIONS, "--trainer.num_sanity_val_steps", "1")
    assert frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path).code == 128 + signal.SIGTERM
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_interrupt_key_at_the_last_step_of_an_epoch(frcnn, tiny_config, tmp_path, undisturbed, with_callback):
    class PressKey(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 5:
                signal.raise_signal(signal.SIGINT)

    with_callback(PressKey())
    options = (*OPTIONS, "--trainer.check_val_every_n_epoch", "3")  # no validation to stop in: before the next epoch
    assert frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path).code == 130
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert load(run)["global_step"] == 6
    with_callback(None)
    result = frcnn(
        *("fit", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"), cwd=tmp_path
    )
    assert result.code == 0, result.err
    theirs, ours = load(undisturbed), load(run)
    assert all(torch.equal(tensor, ours["state_dict"][name]) for name, tensor in theirs["state_dict"].items())


def test_second_interrupt_key_stops_at_once_and_saves_nothing(frcnn, tiny_config, tmp_path, with_callback):
    class PressKeyTwice(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 8:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with_callback(PressKeyTwice())
    assert frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=tmp_path).code == 130
    assert load(tmp_path / "runs" / "tiny" / "seed0")["global_step"] == 6  # of the first epoch's end


def test_crash_after_an_epoch(frcnn, tiny_config, tmp_path, undisturbed, with_callback):
    """A crash saves nothing: the run goes on from the last epoch's end and repeats what came after."""
    with_callback(Raise("on_train_batch_start", 15, RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        frcnn("fit", "--config", tiny_config, *OPTIONS, cwd=tmp_path)
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert load(run)["global_step"] == 12
    with_callback(None)
    resume(frcnn, tiny_config, run)
    assert_same_end(run, undisturbed)


def test_finished_run_has_nothing_to_resume(frcnn, tiny_config, undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "runs" / "tiny" / "seed0"))
    resume(frcnn, tiny_config, run)
    assert load(run)["global_step"] == 18
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (undisturbed, run))
    assert after == before
