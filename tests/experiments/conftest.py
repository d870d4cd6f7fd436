"""Cells of a grid whose commands do little, for the tests of what runs them, and grids as they are left, for those of
what reports on them; and trainings that draw no curves."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
from PIL import Image

from detector.training.callbacks import detection_curves
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.local_launcher import LocalLauncher
from experiments.run.lightning_cli import DetectorCLI

ROOT = Path(__file__).resolve().parents[2]

FAKE = """
import json, os, signal, sys, time
stage, options = sys.argv[1], dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:])
folder = options["folder"]
with open(options["work"], "a") as file:
    file.write(f"{stage} {os.path.basename(folder)}\\n")
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
print("axes", os.environ.get("FRCNN_AXES"), "slot", os.environ.get("SLOT"), end=" ")
print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
while "gate" in options and not os.path.exists(options["gate"]):
    time.sleep(0.01)
    if asked:
        time.sleep(0.3)  # room for a second signal, which must not come
        print(f"asked {len(asked)} times", flush=True)
        sys.exit(1)
if options.get("end") == "crash":
    print("one\\ntwo\\rthree")
    sys.exit(3)
if options.get("end") == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if options.get("end") == "disk":
    sys.exit("OSError: [Errno 28] No space left on device")
with open(os.path.join(folder, "metrics.json"), "w") as file:
    json.dump({"val/AP50_voc07": 0.5, "stage": stage}, file)
"""

RUNNER = """
import sys
from pathlib import Path
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.local_launcher import LocalLauncher
from detector.errors import InputError

if __name__ == "__main__":
    folders = [CellFolder(path) for path in sorted(Path(sys.argv[1]).iterdir())]
    try:
        LocalLauncher([{}] * int(sys.argv[3]), program=sys.argv[2]).run(folders)
    except InputError as error:
        sys.exit(str(error))
"""


class Cells:
    """Folders of cells whose commands are `FAKE`."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "grid"
        self.fake, self.runner = tmp_path / "fake.py", tmp_path / "runner.py"
        self.fake.write_text(FAKE)
        self.runner.write_text(RUNNER)
        self.work = tmp_path / "work.log"
        self.work.touch()

    def make(self, name: str, stages: Sequence[str] = ("fit", "validate"), **options: object) -> CellFolder:
        folder = CellFolder(self.folder / name)
        words = [f"--{key}={value}" for key, value in {"folder": folder.path, "work": self.work, **options}.items()]
        folder.create(
            {
                "name": name,
                "axes": {"scales": name},
                "seed": 7,
                "hash": name,
                "status": "pending",
                "stages": [[stage, *words] for stage in stages],
                "cwd": str(self.folder.parent),
            }
        )
        return folder

    def launch(self, folders: Sequence[CellFolder], slots: Sequence[dict[str, str]] = ({},)) -> LocalLauncher:
        launcher = LocalLauncher(slots, program=str(self.fake))
        launcher.run(folders)
        return launcher

    def start_runner(self, slots: int = 1, **options: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(self.runner), str(self.folder), str(self.fake), str(slots)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def done(self) -> list[str]:
        """What was run, in order: stage and cell."""
        return self.work.read_text().splitlines()

    @staticmethod
    def status(*folders: CellFolder) -> list[str]:
        return [folder.read()["status"] for folder in folders]

    @staticmethod
    def attempts(*folders: CellFolder) -> list[int]:
        return [folder.read().get("attempts", 0) for folder in folders]

    @staticmethod
    def waits(folder: CellFolder) -> bool:
        """Whether the cell's command has begun; one with a gate then waits for it."""
        return folder.log.exists() and "slot" in folder.log.read_text()

    @staticmethod
    def free(folder: CellFolder) -> bool:
        """Whether no process holds the cell."""
        with folder.locked() as lock:
            return lock is not None


@pytest.fixture(autouse=True)
def curves_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a grey picture: those of matplotlib take half a second and more, longer than a tiny validation. Runs that
    tests share have them, and tests of `detector.metrics` and of its callback draw them."""
    grey = io.BytesIO()
    Image.new("L", (8, 8)).save(grey, "png")
    monkeypatch.setattr(detection_curves, "png", lambda *_, **__: grey.getvalue())
    for name in ("curves_figure", "confusion_figure"):
        monkeypatch.setattr(detection_curves, name, lambda _: None)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Put back the variables that a runner sets for its own process and for those that it starts."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def cells(tmp_path) -> Cells:
    return Cells(tmp_path)


@pytest.fixture(scope="session")
def frcnn_process() -> Callable[..., "subprocess.Popen[str]"]:
    """`frcnn_process(*arguments, cwd=folder)` starts a command in a process of its own, with one thread."""

    def start(*arguments: object, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
        inherited = {k: v for k, v in os.environ.items() if k not in ("FRCNN_RUN_DIR", "PL_GLOBAL_SEED")}
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.cli", *(str(argument) for argument in arguments)],
            cwd=cwd,
            env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def process_group() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`process_group(words, cwd=folder, stderr=..., **environment)`: a Python command, as a process group of its own
    that does not outlive the test, with one thread and its output in pipes."""
    started: list[subprocess.Popen[str]] = []

    def start(
        words: Sequence[object], cwd: Path | None = None, stderr: int = subprocess.PIPE, **environment: str
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *(str(word) for word in words)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class GridWriter:
    """Writes the files that a grid leaves, with numbers made up."""

    @staticmethod
    def cell(scales: str, seed: int) -> dict[str, Any]:
        """A cell of a plan."""
        name = f"scales={scales},seed={seed}"
        return {
            "name": name,
            "axes": {"scales": scales},
            "seed": seed,
            "hash": "0" * 64,
            "folder": f"{name}-00000000",
            "overrides": {},
        }

    @staticmethod
    def plan(folder: Path, cells: list[dict[str, Any]], **more: Any) -> None:
        """The plan of a grid."""
        folder.mkdir(parents=True, exist_ok=True)
        plan = {"name": "written", "base": "x.yaml", "axes": {}, "seeds": [0, 1], "baseline": None, "paper": {}} | more
        (folder / "grid.json").write_text(json.dumps(plan | {"cells": cells}))

    @staticmethod
    def run(folder: Path, one: dict[str, Any], status: str, value: float | None = None, **more: Any) -> Path:
        """The run folder of a cell, with metrics if a value is given."""
        run = folder / one["folder"]
        run.mkdir(parents=True, exist_ok=True)
        record = {key: one[key] for key in ("name", "axes", "seed", "hash")} | {"status": status, "error": None}
        (run / "cell.json").write_text(json.dumps(record | more))
        if value is not None:
            metrics = {"test/AP50_voc07": value, "test/proposal_recall@300": value / 2, "val/AP50_voc07": 0.99}
            (run / "metrics.json").write_text(json.dumps(metrics | {"seed": one["seed"]}))
        return run


@pytest.fixture(scope="session")
def writer() -> GridWriter:
    """`writer.cell(scales, seed)`, `writer.plan(folder, cells)`, `writer.run(folder, cell, status, value=None)`."""
    return GridWriter()


@pytest.fixture
def report(frcnn, tmp_path) -> Callable[..., Any]:
    """`report(folder, *options, style="json", refused=False)`: run the command; give back its JSON document, or what it
    printed in another format, or the line with which it refused."""

    def run(folder: Path, *options: object, style: str = "json", refused: bool = False) -> Any:
        result = frcnn("report", folder, *(() if refused else ("--format", style)), *options, cwd=tmp_path)
        if refused:
            assert (result.code, result.out) == (2, ""), result
            assert re.fullmatch(r"frcnn: .*\n", result.err), result.err
            return result.err
        assert result.code == 0, result.err
        return json.loads(result.out) if style == "json" else result.out

    return run


@pytest.fixture
def with_callback(monkeypatch) -> Callable[[pl.Callback | None], None]:
    """Add a callback to the runs of this process."""
    original = DetectorCLI._callbacks

    def add(callback: pl.Callback | None) -> None:
        extra = [callback] if callback else []
        monkeypatch.setattr(DetectorCLI, "_callbacks", lambda self, config: [*extra, *original(self, config)])

    return add
