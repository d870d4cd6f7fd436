"""Trainings that are long, repeated, or divided among processes give what they should."""

import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path
from statistics import mean

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps

from tests.experiments.conftest import with_callback
from tests.faults.conftest import DDP

__all__ = ["with_callback"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_seed_repeats_a_run_to_the_bit(frcnn, tiny_config, tmp_path):
    fit = ("fit", "--config", tiny_config, "--trainer.deterministic", "true", "--data.num_workers", 2)
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert frcnn(*fit, "--seed_everything", seed, "--run_name", name, cwd=tmp_path).code == 0
    runs = {name: tmp_path / "runs" / "tiny" / name for name in "abc"}
    states = {name: torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for name, run in runs.items()}
    a, b = states["a"]["state_dict"], states["b"]["state_dict"]
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    documents = {
        name: json.loads(
            frcnn("compare", runs["a"], runs[name], "--format", "json", "--bootstrap", 2, cwd=tmp_path).out
        )
        for name in "bc"
    }
    assert (documents["b"]["identical"], documents["c"]["identical"]) == (True, False)
    assert "identical: losses, metrics and detections" in frcnn("compare", runs["a"], runs["b"], cwd=tmp_path).out


class Watch(pl.Callback):
    """Memory of this process and its workers, its open files and its children, at every 100th step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % 100 == 50:
            self.seen.append(look())


def look() -> tuple[int, int, int]:
    """Kilobytes in memory with those of the workers, what they share once; open files, children.

    Without pages of files, such as PyTorch's library: how much of them counts depends on what else runs.
    """
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in processes]
    memory = sum(int(size) for text in rollups for size in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", text, re.M))
    return memory, len(os.listdir("/proc/self/fd")), len(processes) - 1


def test_2000_steps_leave_nothing_behind(frcnn, tiny_config, tmp_path, with_callback):
    """From the second quarter to the last one memory grows by less than 5 %."""
    # A first one, by which everything is loaded.
    frcnn("fit", "--config", tiny_config, "--data.num_workers", 2, "--run_name", "first", cwd=tmp_path)
    before, watch = look(), Watch()
    with_callback(watch)
    steps = int(os.environ.get("FRCNN_SOAK_STEPS", "2000"))
    long = ("--trainer.max_epochs", -1, "--trainer.max_steps", steps, "--trainer.check_val_every_n_epoch", 25)
    assert frcnn("fit", "--config", tiny_config, "--data.num_workers", 2, *long, cwd=tmp_path).code == 0
    memory, files, children = zip(*watch.seen, strict=True)
    quarter = len(memory) // 4
    warm, end = mean(memory[quarter : 2 * quarter]), mean(memory[-quarter:])
    print(f"MiB: {[round(size / 1024) for size in memory]}")
    print(f"{steps} steps: {warm / 1024:.0f} MiB in their second quarter, {end / 1024:.0f} in their last")
    # A batch on its way from a worker is an open file more: what is lost for ever raises the fewest, too.
    few, few_at_the_end = min(files[quarter : 2 * quarter]), min(files[-quarter:])
    print(f"files {before[1]} before, from {few} and from {few_at_the_end} on; after {look()[1:]}; all {files}")
    assert end < 1.05 * warm
    assert few_at_the_end <= few and children[-1] == children[quarter] == 4  # of training and validation
    assert look()[1:] <= before[1:]


def test_two_processes_with_half_the_batch_have_its_gradients(fail, mini_voc, tmp_path):
    """Four images of one size, so that none is padded more in a batch of four than in one of two."""
    data = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    name = (data / "ImageSets" / "Main" / "train.txt").read_text().split()[0]
    with Image.open(data / "JPEGImages" / f"{name}.jpg") as image:
        for other, change in enumerate((ImageOps.invert, ImageOps.equalize, ImageOps.solarize, ImageOps.autocontrast)):
            change(image).save(data / "JPEGImages" / f"other{other}.jpg")
            xml = (data / "Annotations" / f"{name}.xml").read_text().replace(f"{name}.jpg", f"other{other}.jpg")
            (data / "Annotations" / f"other{other}.xml").write_text(xml)
    (data / "ImageSets" / "Main" / "four.txt").write_text("\n".join(f"other{number}" for number in range(4)))
    options = ("--data.root", data, "--data.train_splits", "[four]", "--data.augmentation", "none")
    options = (
        *options,
        "--model.rpn.samples_per_image",
        32,
        "--trainer.max_steps",
        1,
        "--trainer.limit_val_batches",
        0,
    )
    gradients = []
    for name, batch_size, processes in (("joint", 4, ()), ("halves", 2, DDP)):
        ended = fail("0:gradients:-1", *options, "--data.batch_size", batch_size, *processes, "--run_name", name)
        assert ended.code == 0, ended.log
        gradients.append(torch.load(tmp_path / "gradients.pt", weights_only=True))
    joint, halves = gradients
    assert max(float(one.abs().max()) for one in joint.values()) > 0.01
    differences = {name: float((one - halves[name]).abs().max()) for name, one in joint.items()}
    print("largest difference of a gradient:", max(differences.values()))
    assert max(differences.values()) < 1e-6
