"""A training in processes of its own, one of which meets a fault at a given moment."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.experiments.conftest import process_group

__all__ = ["process_group"]

PROGRAM = """
import multiprocessing, os, shutil, signal, sys, time
from pathlib import Path
import pytorch_lightning as pl
import torch
from detector.errors import InputError
from experiments.cli import main
from experiments.run import lightning_cli

rank, kind, when = os.environ["FAULT"].split(":")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with

class Fault(pl.Callback):
    def __init__(self):
        self.done = int(os.environ.get("LOCAL_RANK", "0")) != int(rank)

    def happen(self, trainer):
        self.done = True
        if kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == "bad_file":
            raise InputError("x.jpg: cannot be decoded here")
        elif kind == "workers":
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(1)
        elif kind == "folder":
            shutil.rmtree("runs")
        elif kind == "disk":
            with open("runs/filler", "wb", 0) as file:
                try:
                    while file.write(bytes(1024)):
                        pass
                except OSError:
                    pass

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.done and str(trainer.global_step) == when:
            self.happen(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not self.done and batch_idx == 1 and when == ("sanity" if trainer.sanity_checking else "val"):
            self.happen(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if kind == "gradients" and trainer.global_step == 0 and trainer.is_global_zero:
            torch.save({name: p.grad for name, p in pl_module.named_parameters()}, "gradients.pt")

    def on_train_start(self, trainer, pl_module):
        if kind == "gradients":  # what is drawn or counted over a batch would be another thing over half of it
            torch.randperm = lambda count, **_: torch.arange(count)
            for module in pl_module.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()

callbacks = lightning_cli.DetectorCLI._callbacks
lightning_cli.DetectorCLI._callbacks = lambda self, config: [Fault(), *callbacks(self, config)]
sys.exit(main(sys.argv[1:]))
"""
DDP = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Ended:
    """How it ended: exit status, all output, seconds until no process was left; the run folder."""

    code: int
    log: str
    seconds: float
    run: Path

    @property
    def lines(self) -> list[str]:
        """What frcnn says itself."""
        return [line for line in self.log.splitlines() if line.startswith("frcnn: ")]


@pytest.fixture
def fail(process_group, tiny_config, tmp_path) -> Callable[..., Ended]:
    """`fail("RANK:KIND:STEP", *options, before="")`: a training of three epochs with two data workers. No process is
    left, nor any file in shared memory or the temporary folder; a shell command may come first, in a mount namespace of
    its own."""

    def run(fault: str, *options: object, before: str = "", **environment: str) -> Ended:
        (tmp_path / "program.py").write_text(PROGRAM)
        with tempfile.TemporaryDirectory() as temporary:  # of a short name, in which sockets have room
            ended = start(fault, options, before, environment | {"TMPDIR": temporary})
            assert os.listdir(temporary) == []
            return ended

    def start(fault: str, options: Sequence[object], before: str, environment: dict[str, str]) -> Ended:
        shared = {path.name for path in SHARED.glob("torch_*")}
        given = ("--trainer.max_epochs", 3, "--data.eval_batch_size", 1, "--data.num_workers", 2, "--run_name", "mine")
        words = ["program.py", "fit", "--config", tiny_config, *given, *options]
        if before:
            shell = f"{before}; exec python {' '.join(map(str, words))}"
            words = ["-c", f"import os; os.execvp('unshare', ['unshare', '-m', 'sh', '-c', {shell!r}])"]
        environment = {"FAULT": fault, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
        process = process_group(words, cwd=tmp_path, stderr=subprocess.STDOUT, **environment)
        log, _ = process.communicate(timeout=200)  # until the last process has closed its output
        ended = time.monotonic()
        while _alive(process.pid):
            assert time.monotonic() - ended < 30, "a process is left behind"
            time.sleep(0.1)
        assert {path.name for path in SHARED.glob("torch_*")} <= shared
        return Ended(process.returncode, log, time.monotonic() - ended, tmp_path / "runs" / "tiny" / "mine")

    return run


def _alive(group: int) -> bool:
    """Whether a process of a group is there, other than one that has ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = re.sub(r".*\)", "", path.read_text()).split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


@pytest.fixture
def small_tmpfs() -> Callable[[Path, str], str]:
    """`small_tmpfs(folder, "1m")`: the shell command that lays a small file system over a folder; needs root."""
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    if probe.returncode:
        pytest.skip("file systems cannot be mounted here")
    return lambda folder, size: f"mkdir -p {folder} && mount -t tmpfs -o size={size} tmpfs {folder}"


@pytest.fixture
def codes() -> dict[str, int]:
    """Exit status after each signal."""
    return {name: 128 + getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")}
