"""A command with a time limit: its output goes into a file, and the GPU is watched while it runs."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from time import monotonic, sleep
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[3]
GRACE: Final = 10.0
"""Seconds that a command has to end by itself, after SIGTERM."""
SAMPLED: Final = {"gpu_utilization": "utilization.gpu", "gpu_memory_mib": "memory.used", "gpu_watts": "power.draw"}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, None where its time was up; its seconds; means of what the GPU did."""

    code: int | None
    seconds: float
    gpu: dict[str, float]

    @property
    def status(self) -> str:
        """Return done, failed or cut off."""
        return "cut off" if self.code is None else "failed" if self.code else "done"

    def values(self) -> dict[str, Any]:
        """Return what a record keeps of it."""
        return {"status": self.status, "exit_code": self.code, **self.gpu}


def run_limited(
    arguments: Sequence[object],
    log: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    stop_if_asked: Callable[[], None] = lambda: None,
) -> Ended:
    """Run `python -m ARGUMENTS` in the project's folder; end it, with all that it started, when its time is up."""
    began = monotonic()
    with log.open("ab") as file, watched_gpu() as gpu, started(arguments, file, environment) as process:
        code = wait_for(process, max(1.0, seconds - GRACE), stop_if_asked)
    return Ended(code, monotonic() - began, gpu)


def wait_for(process: "subprocess.Popen[bytes]", seconds: float, stop_if_asked: Callable[[], None]) -> int | None:
    """Return a process's exit status, None where it does not end in time; `stop_if_asked` is called meanwhile."""
    until = monotonic() + seconds
    while (code := process.poll()) is None and monotonic() < until:
        stop_if_asked()
        sleep(0.1)
    return code


@contextlib.contextmanager
def started(
    arguments: Sequence[object], log: Any, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Give a running `python -m ARGUMENTS`, a process group of its own, which is ended at the end."""
    command = [sys.executable, "-m", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(environment or {})
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(_end_with, os.getpid()),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # alone: a training ends its own workers, a grid its cells
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # and whatever is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def watched_gpu() -> Iterator[dict[str, float]]:
    """Give means over the time within of what nvidia-smi tells twice a second, at the end; nothing without it."""
    found: dict[str, float] = {}
    query = f"--query-gpu={','.join(SAMPLED.values())}"
    command = ["nvidia-smi", "-i", "0", query, "--format=csv,noheader,nounits", "-lms", "500"]
    try:
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        watcher.terminate()
        rows = [line.split(",") for line in watcher.communicate()[0].splitlines()]
        for column, name in enumerate(SAMPLED):
            values = []
            for row in rows:
                with contextlib.suppress(ValueError, IndexError):  # "[N/A]", half a line
                    values.append(float(row[column]))
            if values:
                found[name] = mean(values) / (100 if name == "gpu_utilization" else 1)
