"""Checkpoints that are damaged, cut short or lack something: what is refused, what is offered, and what goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch


@pytest.fixture(scope="module")
def two_epochs(frcnn, tiny_config, tmp_path_factory) -> Path:
    """Working directory of a finished training of two epochs, twelve steps; read-only."""
    cwd: Path = tmp_path_factory.mktemp("two_epochs")
    assert frcnn("fit", "--config", tiny_config, "--trainer.max_epochs", 2, cwd=cwd).code == 0
    return cwd


@pytest.fixture
def cwd(two_epochs, tmp_path) -> Path:
    shutil.copytree(two_epochs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def checkpoints(cwd: Path, run: str = "seed0") -> Path:
    return cwd / "runs" / "tiny" / run / "checkpoints"


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def flip_a_bit(path: Path) -> None:
    """In the largest tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "text"), [(flip_a_bit, "is damaged: its record last/data/"), (cut, "is damaged: it was cut short")]
)
def test_damage_is_named_with_what_is_whole(frcnn, tiny_config, mini_voc, cwd, damage, text):
    folder = checkpoints(cwd)
    damage(folder / "last.ckpt")
    for command in (
        ("fit", "--config", tiny_config, "--trainer.max_epochs", 3),
        ("validate", "--config", tiny_config),
        ("predict", "--images", mini_voc / "JPEGImages", "--output", "out"),
    ):
        result = frcnn(*command, "--ckpt_path", folder / "last.ckpt", cwd=cwd)
        assert result.code == 2
        line = result.err.splitlines()[-1]
        assert f"last.ckpt: {text}" in line or (f"last.ckpt: {text.replace('last/', 'archive/')}" in line)
        assert line.endswith("whole are best.ckpt (step 6), last-previous.ckpt (step 6) beside it") or line.endswith(
            "whole are best.ckpt (step 12), last-previous.ckpt (step 6) beside it"
        )
    # The command line that starts weights from it refuses it, too.
    weights = frcnn("fit", "--config", tiny_config, "--model.weights", folder / "last.ckpt", cwd=cwd)
    assert weights.code == 2
    assert "last.ckpt" in weights.err
    assert "damaged" in weights.err


def test_last_takes_the_newest_whole_one_and_ends_as_if_nothing_had_happened(frcnn, tiny_config, cwd, capsys):
    folder = checkpoints(cwd)
    undisturbed = load(folder / "last.ckpt")
    flip_a_bit(folder / "last.ckpt")
    (folder / "best.ckpt").unlink()
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    with pytest.warns(UserWarning, match=r"last\.ckpt: is damaged: .*; going on from last-previous\.ckpt"):
        assert frcnn(*fit, cwd=cwd).code == 0
    again = load(folder / "last.ckpt")
    assert again["global_step"] == 12
    assert all(torch.equal(tensor, again["state_dict"][name]) for name, tensor in undisturbed["state_dict"].items())
    assert [path.name for path in folder.parents[1].iterdir()] == ["seed0"]
    cut(folder / "last.ckpt")
    cut(folder / "last-previous.ckpt")
    (folder / "best.ckpt").unlink()
    result = frcnn(*fit, cwd=cwd)
    assert result.code == 2
    assert "there is no whole checkpoint in" in result.err


def test_last_before_and_after_a_kill(frcnn, tiny_config, two_epochs, tmp_path, with_callback):
    """The same command begins, begins again where nothing was saved, and goes on; also of a named run."""

    class Kill(pl.Callback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == self.step:
                raise RuntimeError("killed")

    options = ("--config", tiny_config, "--run_name", "mine", "--ckpt_path", "last")
    fit = ("fit", *options, "--trainer.max_epochs", 2)
    result = frcnn("validate", *options, cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--ckpt_path last: runs holds no checkpoint" in result.err
    for step in (2, 8):
        with_callback(Kill(step))
        with pytest.raises(RuntimeError, match="killed"):
            frcnn(*fit, cwd=tmp_path)
    with_callback(None)
    assert frcnn(*fit, cwd=tmp_path).code == 0
    assert frcnn("validate", *options, cwd=tmp_path).code == 0
    ours, theirs = load(checkpoints(tmp_path, "mine") / "last.ckpt"), load(checkpoints(two_epochs) / "last.ckpt")
    assert ours["global_step"] == 12
    assert all(torch.equal(tensor, ours["state_dict"][name]) for name, tensor in theirs["state_dict"].items())
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["mine"]


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_between_its_last_checkpoint_and_its_final_numbers(frcnn, tiny_config, cwd, earlier):
    """It is validated, and has the same numbers and detections; a run that has them is left alone."""
    run = checkpoints(cwd).parent
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert "Nothing was changed" in frcnn(*fit, cwd=cwd).err
    before = json.loads((run / "metrics.json").read_text())
    detections = (run / "predictions.json").read_bytes()
    if earlier:  # the numbers of an earlier end
        (run / "metrics.json").write_text(json.dumps(before | {"step": 6, "epoch": 1, "train/loss": 9.0}))
    else:
        (run / "metrics.json").unlink()
    (run / "predictions.json").unlink()
    assert frcnn(*fit, cwd=cwd).code in (0, None)
    after = json.loads((run / "metrics.json").read_text())
    assert after == {name: value for name, value in before.items() if name != "train/images_per_second"}
    assert (run / "predictions.json").read_bytes() == detections


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_kill_in_the_first_epoch_costs_minutes(frcnn, tiny_config, tmp_path, with_callback, accumulate):
    """Saved after every step, at no other moment; the training goes on bit for bit."""

    class Kill(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("killed")

    fit = ("fit", "--config", tiny_config, "--trainer.accumulate_grad_batches", accumulate)
    fit = (*fit, "--save_every_minutes", 1e-9)
    assert frcnn(*fit, "--run_name", "whole", cwd=tmp_path).code == 0
    with_callback(Kill())
    with pytest.raises(RuntimeError, match="killed"):
        frcnn(*fit, cwd=tmp_path)
    folder = checkpoints(tmp_path)
    assert load(folder / "last.ckpt")["global_step"] == 5 // accumulate
    assert load(folder / "last-previous.ckpt")["global_step"] == 5 // accumulate - 1
    with_callback(None)
    assert frcnn(*fit, "--ckpt_path", "last", cwd=tmp_path).code == 0
    ours, theirs = load(folder / "last.ckpt"), load(checkpoints(tmp_path, "whole") / "last.ckpt")
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, ours[part][name]) for name, tensor in theirs[part].items())


@pytest.mark.parametrize("key", ["optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"])
def test_what_no_training_can_go_on_from_is_not_restored(frcnn, tiny_config, cwd, caplog, key):
    content = load(checkpoints(cwd) / "last.ckpt")
    del content[key]
    torch.save(content, cwd / "less.ckpt")
    fit = ("fit", "--config", tiny_config, "--ckpt_path", cwd / "less.ckpt", "--trainer.max_epochs", 3)
    result = frcnn(*fit, cwd=cwd)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"holds weights and no state of a training (no {key})" in result.err
    assert "Restored" not in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("state_dict", [1, 2], "state_dict is a list"),
        ("state_dict", {"model.x": 1}, "state_dict.model.x is no tensor"),
        ("hyper_parameters", 3, "hyper_parameters is a int"),
    ],
)
def test_contents_of_other_kinds(frcnn, mini_voc, cwd, key, value, text):
    torch.save(load(checkpoints(cwd) / "last.ckpt") | {key: value}, cwd / "odd.ckpt")
    predict = ("predict", "--ckpt_path", "odd.ckpt", "--images", mini_voc / "JPEGImages", "--output", "out")
    result = frcnn(*predict, cwd=cwd)
    assert result.code == 2
    assert result.err == f"frcnn: odd.ckpt: not a checkpoint of frcnn fit ({text})\n"


@pytest.mark.slow
def test_ten_million_anchor_scales_are_refused(frcnn, mini_voc, cwd):
    content = load(checkpoints(cwd) / "last.ckpt")
    content["hyper_parameters"]["anchors"]["scales"] = [8.0] * 10_000_000
    torch.save(content, cwd / "odd.ckpt")
    predict = ("predict", "--ckpt_path", "odd.ckpt", "--images", mini_voc / "JPEGImages", "--output", "out")
    result = frcnn(*predict, cwd=cwd)
    said = "frcnn: odd.ckpt: anchors: 10000000 scales x 1 aspect_ratios; at most 10000 shapes\n"
    assert (result.code, result.err) == (2, said)


def test_changed_options_stop_a_resume(frcnn, tiny_config, cwd):
    last = checkpoints(cwd) / "last.ckpt"
    before = last.read_bytes()
    fit = ("fit", "--config", tiny_config, "--ckpt_path", last, "--trainer.max_epochs", 3)
    result = frcnn(*fit, "--model.optimizer.lr", 0.001, "--data.batch_size", 3, "--data.num_workers", 1, cwd=cwd)
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        f"frcnn: {last}: would go on with other options: data.batch_size: 2 in the checkpoint, 3 from here on; "
        "model.optimizer.lr: 0.003 in the checkpoint, 0.001 from here on; give the checkpoint's, or "
        f"--resume_changed true to go on with these, or --model.weights {last} instead of --ckpt_path for a new "
        "training that begins with its weights"
    )
    assert last.read_bytes() == before
    # Permission is given for one time: it is in no config.
    assert frcnn(*fit, "--model.optimizer.lr", 0.001, "--resume_changed", "true", cwd=cwd).code == 0
    assert "resume_changed: null" in (last.parents[1] / "config_resumed_1.yaml").read_text()
