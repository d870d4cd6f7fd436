"""How trainings end that cannot go on: in one line, with a known exit status, and no process is left."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.faults.conftest import DDP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def step_of(run: Path) -> int:
    """The step of last.ckpt."""
    step: int = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    return step


# ---- asked to ----


def test_training_that_nothing_disturbs(fail):
    ended = fail("9:none:0")
    assert (ended.code, ended.lines) == (0, []), ended.log


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signal_saves_after_the_step(fail, codes, name):
    ended = fail(f"0:{name}:8")
    assert (ended.code, ended.lines) == (codes[name], []), ended.log
    assert step_of(ended.run) == 9


@pytest.mark.parametrize(
    ("fault", "options", "step"),
    [
        ("0:SIGHUP:val", (), 6),
        ("0:SIGTERM:2", DDP, 3),  # an epoch's last step of two processes: before the next one
        ("1:SIGUSR2:4", DDP, 5),  # of the other process alone
        ("1:SIGHUP:val", DDP, 3),
    ],
)
def test_signal_in_validations_and_several_processes(fail, codes, fault, options, step):
    ended = fail(fault, *options)
    assert (ended.code, ended.lines) == (codes[fault.split(":")[1]], []), ended.log
    assert step_of(ended.run) == step


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_in_the_sanity_check_saves_nothing(fail, codes, name):
    ended = fail(f"0:{name}:sanity", "--trainer.num_sanity_val_steps", 3)
    assert ended.code == codes[name], ended.log
    assert "Traceback" not in ended.log
    assert not list(ended.run.rglob("*.ckpt"))


@pytest.mark.parametrize("outcome", ["exit 0", "echo no such job >&2; exit 1"])
def test_slurm_job_goes_back_into_the_queue(fail, tmp_path, outcome):
    """What Lightning would do itself, in the middle of a step: a checkpoint in the current folder, and no end."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{outcome}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "train"}
    job |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    ended = fail("0:SIGUSR1:8", before=f"export PATH={tmp_path}/bin:$PATH", **job)
    assert ended.code == 138, ended.log
    assert (tmp_path / "asked").read_text().split() == ["requeue", "1234"]
    assert step_of(ended.run) == 9
    assert not list(tmp_path.glob("*.ckpt"))
    assert ("no such job; submit the job again" in ended.log) == ("no such job" in outcome)


# ---- lost processes ----


def test_killed_process_is_named_by_the_first(fail):
    ended = fail("1:SIGKILL:2", *DDP)
    assert ended.code == 1
    (line,) = ended.lines
    assert re.search(r"rank 1 \(process \d+\) was killed by SIGKILL, perhaps because memory ran out", line)


def test_the_others_end_without_the_first(fail):
    ended = fail("0:SIGKILL:2", *DDP)
    assert ended.code == -9
    assert [re.sub(r"\(.*", "", line) for line in ended.lines] == [
        "frcnn: rank 1: the process that has started this one has ended, and so this one ends"
    ]


def test_workers_end_without_their_training(fail):
    assert fail("0:SIGKILL:8").code == -9


def test_each_process_says_its_own_error(fail):
    ended = fail("1:bad_file:2", *DDP)
    assert ended.code == 2
    assert ended.lines[0] == "frcnn: rank 1: x.jpg: cannot be decoded here"
    assert re.search(r"rank 1 \(process \d+\) ended with exit status 2", ended.lines[1])
    assert len(ended.lines) == 2 and "Traceback" not in ended.log


def test_error_of_the_first_process_ends_all(fail):
    ended = fail("0:bad_file:2", *DDP)
    assert (ended.code, ended.lines) == (2, ["frcnn: x.jpg: cannot be decoded here"])


def test_killed_data_worker(fail):
    ended = fail("0:workers:2")
    assert ended.code == 1
    assert re.fullmatch(r"frcnn: a data worker \(process \d+\) was killed \(Killed\); .*num_workers", ended.lines[-1])
    assert "Traceback" not in ended.log


# ---- no room ----


@pytest.mark.parametrize("options", [(), DDP], ids=["one process", "two"])
def test_full_shared_memory(fail, small_tmpfs, options):
    """The training heard nothing of it, and waited for ever."""
    before = small_tmpfs(Path("/dev/shm"), "300k")
    ended = fail("9:none:0", *options, before=before)
    assert ended.code == 1, ended.log
    assert re.match(
        r"frcnn: a batch of [\d.]+ MB does not fit into shared memory \(/dev/shm, has .* of 0\.3 MB", ended.lines[0]
    )


def test_full_disk(fail, small_tmpfs, tmp_path):
    ended = fail("0:disk:8", before=small_tmpfs(tmp_path / "runs", "40m"))
    assert ended.code in (1, 2), ended.log
    assert "No space left on device" in ended.lines[-1] or "make room" in ended.lines[-1]
    assert "Traceback" not in ended.log


def test_removed_run_folder(fail):
    ended = fail("0:folder:8")
    assert ended.code in (1, 2), ended.log
    assert re.fullmatch(r"frcnn: runs/tiny/mine/\S+: No such file or directory", ended.lines[-1])
    assert "Traceback" not in ended.log


# ---- uneven shares ----


@pytest.mark.parametrize("images", [1, 2, 3])
def test_few_images_and_a_rank_without_objects(fail, mini_voc, metrics_of, tmp_path, images):
    """Each image is used, one repeated where ranks lack one; the objects of the second image are taken out."""
    data = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    names = (data / "ImageSets" / "Main" / "train.txt").read_text().split()[:images]
    (data / "ImageSets" / "Main" / "few.txt").write_text("\n".join(names))
    if images == 2:
        annotation = data / "Annotations" / f"{names[1]}.xml"
        annotation.write_text(re.sub(r"<object>.*</object>", "", annotation.read_text(), flags=re.DOTALL))
    few = ("--data.root", data, "--data.train_splits", "[few]", "--data.val_splits", "[few]", "--data.batch_size", 1)
    ended = fail("9:none:0", *few, *DDP)
    assert (ended.code, ended.lines) == (0, []), ended.log
    metrics = metrics_of(ended.run)
    assert metrics["step"] == 3  # of three epochs: one step of two images each
    assert math.isfinite(metrics["train/loss"])
    found = json.loads((ended.run / "predictions.json").read_text())
    assert {row["file_name"] for row in found} <= {f"{name}.jpg" for name in names}
