"""A training that goes on under other options, or under another name: what changes, what is said, what stays."""

import itertools
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from detector.callbacks import throughput


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
    """Of the second of three epochs, of six steps each, two are done: the bar counts on from there, to six, so that it
    has a rate and the time that is left. The clock of images per second starts at the resume."""
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 3, "--trainer.enable_progress_bar", "true")
    with_callback(StopAfter(7))
    assert frcnn(*fit, cwd=tmp_path).code == 143
    seen, rates = [], []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            bar = trainer.progress_bar_callback.train_progress_bar
            seen.append((trainer.global_step, bar.desc, bar.n, bar.initial, bar.total))
            rates.append(float(trainer.callback_metrics.get("train/images_per_second", math.nan)))

    seconds = itertools.count(1000)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    with_callback(Watch())
    assert frcnn(*fit, "--ckpt_path", last_of(tmp_path), cwd=tmp_path).code == 0
    assert seen[0] == (8, "Epoch 1: ", 2, 2, 6)
    assert seen[4] == (12, "Epoch 2: ", 0, 0, 6)
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
    assert "cosine needs the training's length: give --trainer.max_epochs" in result.err
    assert result.err.count("\n") == 1
    fit += ["--model.optimizer.schedule", "constant", "--model.optimizer.warmup_steps", 0]
    result = frcnn(*fit, cwd=tmp_path)
    assert result.code == 0, result.err
    rates = {group["lr"] for group in load(last_of(tmp_path))["optimizer_states"][0]["param_groups"]}
    assert rates == {0.003}
