"""Runs the cells of a grid on this machine: several at once, sharing them with other runners by the cells' locks."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from detector.errors import InputError
from experiments.ablation.cell_folder import CellFolder, shell_line
from experiments.ablation.launcher import Launcher
from experiments.ablation.processes import PROGRAM, Job, exit_code, prepare, send, start
from experiments.run.folder import AXES_VARIABLE

GRACE = 120.0
"""Seconds that an interrupted command gets to finish its step and to save."""
FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
ELSEWHERE = 1.0
"""Seconds between two looks at cells that another runner holds."""
LAST_MOMENTS = 5.0
"""Seconds that the process of an engine may live on after it has killed the commands that it had started."""


@dataclass
class Attempt:
    """A cell at work, with the position of what it computes on, the first word of its command and that process."""

    folder: CellFolder
    lock: int
    slot: int
    stage: str
    process: BaseProcess
    started: float
    asked: float | None = None  # to stop


class LocalLauncher(Launcher):
    """What runs cells as processes of this machine.

    A cell that fails never ends the others, but a full disk lets no new one start (`reason` then says so).

    Args:
        slots: Environment of each of the cells that run at the same time: its GPUs, its threads.
        patience: Seconds that pass before a killed command counts as failed. When Ray loses a machine, its processes
            there kill the command first and themselves next: the cell is not to be noted as failed in between.
        program: What gets the arguments of the cells' commands.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]], patience: float = 0, program: str = PROGRAM) -> None:
        super().__init__()
        self.slots = list(slots)
        self.patience = patience
        self.program = program
        self._free = list(range(len(self.slots)))
        self._attempts: list[Attempt] = []
        self._failed: dict[CellFolder, int] = {}
        prepare(self.slots[0], program)
        self._next_look: dict[CellFolder, float] = {}

    def run(self, folders: Sequence[CellFolder], tick: Callable[[], None] = lambda: None) -> None:
        """Run what is not done, as `Launcher.run` says."""
        left = list(folders)
        # By their attempts, because clocks jump: what fails from here on is not tried again.
        self._failed = {folder: folder.attempts for folder in folders if folder.read().get("status") == "failed"}
        try:
            with self.listening():
                while True:
                    self._look()
                    if not self.stops and self.reason is None:
                        left = [folder for folder in left if not self._take(folder)]
                    tick()
                    if not self._attempts and (not left or self.stops or self.reason is not None):
                        return
                    self._wait()
        except OSError as error:
            raise InputError(f"{error.filename or folders[0].path.parent}: cannot write ({error.strerror})") from error
        finally:
            for attempt in self._attempts:  # after an error: nothing goes on without a runner
                send(attempt.process, signal.SIGKILL)
                attempt.process.join()
                with contextlib.suppress(OSError):
                    attempt.folder.end("interrupted", time.monotonic() - attempt.started, None)
                os.close(attempt.lock)
            self._attempts = []

    def drain(self) -> None:
        """Stop gently, and return when the commands have ended: for a signal handler that interrupts `run`."""
        self.stop()
        while self._attempts:
            self._look()
            self._wait()

    def _look(self) -> None:
        """See which commands have ended, and pass on requests to stop."""
        for attempt in list(self._attempts):
            code = exit_code(attempt.process)
            if code is not None:
                self._attempts.remove(attempt)
                try:
                    self._ended(attempt, code)
                except BaseException:
                    self._release(attempt)
                    raise
        for attempt in self._attempts if self.stops else []:
            if attempt.asked is None:
                attempt.asked = time.monotonic()
                send(attempt.process, signal.SIGINT)
            elif self.stops > 1 or time.monotonic() - attempt.asked > GRACE:
                send(attempt.process, signal.SIGKILL)

    def _wait(self) -> None:
        wait([attempt.process.sentinel for attempt in self._attempts], 0.1)

    # ---- starting ----

    def _take(self, folder: CellFolder) -> bool:
        """Start a cell, or find that there is nothing to do; False where it is still to be looked at."""
        if not self._free or time.monotonic() < self._next_look.get(folder, 0):
            return False
        lock = folder.lock()
        if lock is None:  # another runner has it
            self._next_look[folder] = time.monotonic() + ELSEWHERE
            return False
        try:
            status, started = folder.read().get("status"), time.monotonic()
            stage = None
            if status != "done" and (status != "failed" or self._failed.get(folder) == folder.attempts):
                folder.begin()
                stage, error = self._next(folder)
                if stage is None:
                    folder.end("done" if error is None else "failed", 0, error=error)
            if stage is None:
                os.close(lock)
                return True
            slot = self._free.pop(0)
            process = self._start(folder, stage, slot, lock)
        except BaseException:
            os.close(lock)
            raise
        self._attempts.append(Attempt(folder, lock, slot, stage[0], process, started))
        return True

    def _start(self, folder: CellFolder, stage: tuple[str, ...], slot: int, lock: int) -> BaseProcess:
        state = folder.read()
        environment = dict(self.slots[slot])
        if stage[0] == "fit" or len(state["stages"]) == 1:
            environment[AXES_VARIABLE] = json.dumps(state["axes"] | {"seed": state["seed"]})
        with folder.log.open("a") as log:
            log.write(f"$ {shell_line(stage)}\n")
        return start(Job(stage, str(folder.log.absolute()), state["cwd"], environment, self.program), lock)

    # ---- ending ----

    def _ended(self, attempt: Attempt, code: int) -> None:
        folder = attempt.folder
        status, error = "failed", None
        if code == 0:
            stage, error = self._next(folder, attempt.stage)
            if stage is not None and not self.stops:
                attempt.stage = stage[0]
                attempt.process = self._start(folder, stage, attempt.slot, attempt.lock)
                self._attempts.append(attempt)
                return
            status = "interrupted" if stage is not None else "done" if error is None else "failed"
        elif self.stops:
            status = "interrupted"
        else:
            error = self._error(folder, code)
        folder.end(status, time.monotonic() - attempt.started, code, error)
        self._release(attempt)

    @staticmethod
    def _next(folder: CellFolder, finished: str | None = None) -> tuple[tuple[str, ...] | None, str | None]:
        """Return the arguments of the next command, after one that has ended; or why there can be none."""
        try:
            return folder.next_stage() if finished is None else folder.finish(finished), None
        except InputError as error:
            return None, str(error)

    def _error(self, folder: CellFolder, code: int) -> str:
        error = folder.log_tail()
        if any(text in error for text in FULL_DISK):
            self.reason = "the disk is full, so no more cells are started"
        if code < 0:
            time.sleep(self.patience)
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            error = f"killed by {signal.Signals(-code).name}{hint}\n{error}".rstrip()
        return error or f"exit status {code}, and an empty log"

    def _release(self, attempt: Attempt) -> None:
        self._free = sorted([*self._free, attempt.slot])
        os.close(attempt.lock)


def run_cell(path: str, environment: Mapping[str, str], program: str = PROGRAM) -> str:
    """Run one cell here to its end, wherever here is: what other machines execute; return its status."""
    folder = CellFolder(Path(path))
    LocalLauncher([environment], LAST_MOMENTS, program).run([folder])
    return str(folder.read()["status"])
