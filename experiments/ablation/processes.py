"""Processes that run the commands of cells.

Each is its own process in its own process group, so that Ctrl-C reaches it through the runner only; writes into the
cell's log; dies when its runner does (Linux); and holds the cell's lock as long as it lives.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from datamodules.parallel import die_with

COMMAND = (sys.executable, "-m", "experiments.cli")
SOURCE = str(Path(__file__).resolve().parents[2])
NOT_INHERITED = {
    "FRCNN_RUN_DIR",
    "FRCNN_AXES",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "SLURM_NTASKS",  # for Lightning, a sign that SLURM starts one process per device
}


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        arguments: Of `frcnn`.
        log: File that its output is added to.
        cwd: Working directory.
        environment: Variables beside those of the runner.
    """

    arguments: tuple[str, ...]
    log: str
    cwd: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """The whole environment, without what belongs to another run."""
        kept = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        path = os.pathsep.join(dict.fromkeys([SOURCE, *filter(None, [kept.get("PYTHONPATH")])]))
        # Safe path: Python would put the working directory, which may hold modules of any name, before ours.
        ours = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        return kept | ours | dict(self.environment)


class Process(Protocol):
    """A command that was started."""

    pid: int

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""

    def signal(self, number: int) -> None:
        """Send a signal to it; SIGKILL goes to everything that it has started, too."""


class Starter(Protocol):
    """Starts commands."""

    def start(self, job: Job, lock: int) -> Process:
        """Start one that inherits the file descriptor `lock`."""

    def wait(self, seconds: float) -> None:
        """Wait so long, or until some command has ended."""

    def close(self) -> None:
        """Release what starting needs."""


class PlainStarter:
    """Starts `python -m experiments.cli` afresh: for several devices, whose other processes repeat the command.

    Args:
        command: What gets the arguments.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.command = tuple(command)

    def start(self, job: Job, lock: int) -> Process:
        """As `Starter.start`."""
        with open(job.log, "ab") as log:
            popen = subprocess.Popen(
                [*self.command, *job.arguments],
                cwd=job.cwd,
                env=job.variables(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                process_group=0,
                preexec_fn=partial(_begin, os.getpid()),
            )
        return PlainProcess(popen)

    def wait(self, seconds: float) -> None:
        """As `Starter.wait`."""
        time.sleep(min(seconds, 0.05))

    def close(self) -> None:
        """Nothing is held."""


class PlainProcess:
    """A process started by `PlainStarter`."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self.pid = popen.pid

    def poll(self) -> int | None:
        """As `Process.poll`."""
        code = self._popen.poll()
        if code is not None:
            _kill_group(self.pid)  # workers, and processes of other devices, that it left behind
        return code

    def signal(self, number: int) -> None:
        """As `Process.signal`."""
        _signal(self.pid, number)


class ForkStarter:
    """Starts commands by forking a process that has imported everything once, which saves seconds per command.

    Args:
        environment: Variables of that process that libraries read when they are loaded (OMP_NUM_THREADS).
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        self._server: subprocess.Popen[bytes] | None = None
        self._codes: dict[int, int] = {}
        self._alive: set[int] = set()
        self._rest = b""

    def prepare(self) -> None:
        """Begin to import."""
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "experiments.cli_server", str(theirs.fileno())],
                env=Job((), "", "", self._environment).variables(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # signals to the runner's group are the runner's to handle
            )

    def start(self, job: Job, lock: int) -> Process:
        """As `Starter.start`."""
        if self._server is None:
            self.prepare()
        try:
            return self._start(job, lock)
        except OSError:  # it was killed; its successor may live longer
            self._restart()
            return self._start(job, lock)

    def _start(self, job: Job, lock: int) -> Process:
        content = asdict(job) | {"environment": job.variables()}
        socket.send_fds(self._socket, [json.dumps(content).encode() + b"\n"], [lock])
        while (started := self._receive(None)) is None:
            pass
        self._alive.add(started)
        return ForkedProcess(started, self)

    def wait(self, seconds: float) -> None:
        """As `Starter.wait`."""
        if self._server is not None:
            with contextlib.suppress(ConnectionResetError):
                self._receive(seconds)
        else:
            time.sleep(seconds)

    def code(self, pid: int) -> int | None:
        """Exit code of a process that has ended."""
        if pid not in self._codes:
            self.wait(0)
        return self._codes.get(pid)

    def close(self) -> None:
        """End the process that forks; whatever it started dies with it."""
        if self._server is not None:
            self._socket.close()
            self._server.kill()  # it may still be importing
            self._server.wait()
            self._server = None

    def _receive(self, seconds: float | None) -> int | None:
        """Note who has ended; the process id of one that was just started."""
        if b"\n" not in self._rest:
            if not select.select([self._socket], [], [], seconds)[0]:
                return None
            received = self._socket.recv(65536)
            if not received:
                self._restart()
                raise ConnectionResetError("the process that starts cells was killed")
            self._rest += received
        started = None
        while b"\n" in self._rest and started is None:
            line, self._rest = self._rest.split(b"\n", 1)
            message = json.loads(line)
            if "code" in message:
                self._codes[message["pid"]] = message["code"]
                self._alive.discard(message["pid"])
                _kill_group(message["pid"])
            else:
                started = int(message["pid"])
        return started

    def _restart(self) -> None:
        """The process that forks is gone, and all that it had started with it."""
        self._codes |= dict.fromkeys(self._alive, -signal.SIGKILL)
        self._alive, self._rest = set(), b""
        self.close()
        self.prepare()


class ForkedProcess:
    """A process started by `ForkStarter`."""

    def __init__(self, pid: int, starter: ForkStarter) -> None:
        self.pid = pid
        self._starter = starter

    def poll(self) -> int | None:
        """As `Process.poll`."""
        return self._starter.code(self.pid)

    def signal(self, number: int) -> None:
        """As `Process.signal`."""
        _signal(self.pid, number)


def _signal(pid: int, number: int) -> None:
    if number == signal.SIGKILL:
        _kill_group(pid)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _begin(parent: int) -> None:
    """In a new process, before its program."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray's workers block SIGINT, which asks a training to save
    die_with(parent)
