"""Trainings that are killed at any moment, and go on by the same command: they end as if nothing had happened.

Each training is a fork of one process that has imported everything. `last.ckpt` is saved after every step; in every
fourth trial the training dies when a part of a checkpoint is written.
"""

import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from experiments.cli import main
from experiments.run.lightning_cli import DetectorCLI

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

OPTIONS = ("--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "2", "--save_every_minutes", "1e-9")
ENDLESS = 120.0


def train(words: Sequence[str], cwd: Path, environment: Mapping[str, str], last_save: int | None) -> None:
    """Be a training, in a process of its own, that may die while it saves for the n-th time."""
    os.chdir(cwd)
    for name in ("FRCNN_RUN_DIR", "PL_GLOBAL_SEED"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    log = os.open(f"log{environment.get('RANK', '')}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not pytest's
    torch.set_num_threads(1)
    if last_save is not None:
        torch.save = Dying(last_save)
    callbacks = DetectorCLI._callbacks
    DetectorCLI._callbacks = lambda self, config: [Place(), *callbacks(self, config)]  # type: ignore[method-assign]
    os._exit(main([*words]))


class Place(pl.Callback):
    """Keeps in the file `place` where the training is: in a validation, or in the second half of a step."""

    def __init__(self) -> None:
        self.file = os.open("place", os.O_WRONLY | os.O_CREAT)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note("" if batch_idx % 2 else "in an accumulated step")

    def on_validation_start(self, trainer, pl_module):
        self.note("in a validation")

    def on_validation_end(self, trainer, pl_module):
        self.note("")

    def note(self, place: str) -> None:
        os.pwrite(self.file, place.ljust(30).encode(), 0)


class Dying:
    """A `torch.save` that kills its process in the middle of the n-th checkpoint."""

    def __init__(self, last: int) -> None:
        self.left, self.save = last, torch.save

    def __call__(self, content: Any, file: Any) -> None:
        self.left -= 1
        if self.left:
            self.save(content, file)
            return
        whole = io.BytesIO()
        self.save(content, whole)
        file.write(whole.getvalue()[: random.Random(len(os.listdir())).randrange(len(whole.getvalue()))])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


class Training:
    """A training in one or several processes, all of which are killed at once."""

    def __init__(self, words: Sequence[object], cwd: Path, ranks: int = 1, last_save: int | None = None) -> None:
        cwd.mkdir(exist_ok=True)
        self.checkpoints = cwd / "runs" / "tiny" / "mine" / "checkpoints"
        given = [str(word) for word in words]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        group |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "1"}
        fork = multiprocessing.get_context("fork")
        self.processes = []
        for rank in range(ranks):
            own = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            self.processes.append(fork.Process(target=train, args=(given, cwd, own, last_save)))
            self.processes[-1].start()

    def end(self) -> list[int | None]:
        """Wait; return the exit statuses."""
        for process in self.processes:
            process.join(ENDLESS)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill_when(self, due: Callable[[], bool]) -> None:
        """Kill as soon as it is time, or the training has ended."""
        until = time.monotonic() + ENDLESS
        while not due() and all(process.is_alive() for process in self.processes) and time.monotonic() < until:
            time.sleep(0.0005)
        self.kill()

    def kill(self) -> None:
        """Kill."""
        for process in self.processes:
            process.kill()
            process.join()


def writes(checkpoints: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return checkpoints.is_dir() and any(path.name.endswith(".partial") for path in checkpoints.iterdir())


def results(cwd: Path) -> tuple[dict[str, Any], Any, dict[str, torch.Tensor]]:
    """Return metrics but for the speed and the commit, predictions and weights."""
    run = cwd / "runs" / "tiny" / "mine"
    metrics = json.loads((run / "metrics.json").read_text())
    kept = {name: value for name, value in metrics.items() if name not in ("train/images_per_second", "git_commit")}
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return kept, json.loads((run / "predictions.json").read_text()), weights["state_dict"]


class Undisturbed:
    """A training that nothing disturbs: its results, and how long it works after its folder is there."""

    def __init__(self, fit: Sequence[object], cwd: Path, ranks: int = 1) -> None:
        self.fit, self.ranks = fit, ranks
        training = Training(fit, cwd, ranks)
        while not training.checkpoints.parent.is_dir() and training.processes[0].is_alive():
            time.sleep(0.001)
        began = time.monotonic()
        assert training.end() == [0] * ranks, (cwd / "log.txt").read_text()
        self.seconds = time.monotonic() - began
        self.results = results(cwd)
        self.counts: Counter[str] = Counter()

    def survives(self, trial: int, cwd: Path) -> bool:
        """Kill at a random moment, go on, and return whether all is the same; count where it was."""
        training = Training(self.fit, cwd, self.ranks)
        run, moment = training.checkpoints.parent, random.Random(trial).uniform(0, self.seconds)
        training.kill_when(run.is_dir if trial else lambda: True)
        if trial:  # the first is killed at its very start
            last_save = None if trial % 4 else 1 + trial // 4 % 8
            training = Training(self.fit, cwd, self.ranks, last_save)
            at = time.monotonic() + moment
            training.kill_when(lambda: last_save is None and time.monotonic() > at)
        place = (cwd / "place").read_text().strip() if (cwd / "place").is_file() else ""
        place = "while a checkpoint was written" if writes(training.checkpoints) else place or "elsewhere"
        codes = Training(self.fit, cwd, self.ranks).end()
        ours, theirs = results(cwd), self.results
        same = all(torch.equal(tensor, ours[2][name]) for name, tensor in theirs[2].items())
        identical = codes == [0] * self.ranks and ours[:2] == theirs[:2] and same
        print(f"trial {trial}: killed {place}: {codes}, {'identical' if identical else 'not identical'}")
        self.counts.update([place, *["identical"] * identical])
        return identical

    def __str__(self) -> str:
        places = ", ".join(f"{count} {place}" for place, count in self.counts.items() if place != "identical")
        return f"\n{self.ranks} processes killed: {places}; {self.counts['identical']} ended identical"


@pytest.fixture(scope="module")
def fit(tiny_config) -> tuple[object, ...]:
    return ("fit", "--config", tiny_config, *OPTIONS, "--run_name", "mine", "--ckpt_path", "last")


@pytest.fixture(scope="module")
def undisturbed(fit, tmp_path_factory) -> Iterator[Undisturbed]:
    yield (training := Undisturbed(fit, tmp_path_factory.mktemp("undisturbed")))
    print(training)


@pytest.mark.parametrize("trial", range(20))
def test_killed_at_a_random_moment(undisturbed, tmp_path, trial):
    assert undisturbed.survives(trial, tmp_path)


@pytest.fixture(scope="module")
def two_processes(fit, tmp_path_factory) -> Iterator[Undisturbed]:
    where = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    yield (training := Undisturbed((*fit, *where), tmp_path_factory.mktemp("two_processes"), ranks=2))
    print(training)


@pytest.mark.parametrize("trial", range(5))
def test_two_processes_killed_at_a_random_moment(two_processes, tmp_path, trial):
    assert two_processes.survives(trial + 100, tmp_path)
