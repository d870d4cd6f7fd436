"""Runs the cells of a grid on this machine: several at once, sharing them with other runners by the cells' locks."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from detector.errors import InputError
from experiments.ablation.cell_folder import CellFolder, now, shell_line
from experiments.ablation.processes import COMMAND, SOURCE, Job, PlainStarter, Process, Starter
from experiments.run.folder import AXES_VARIABLE

Tick = Callable[[], None]
GRACE = 120.0
"""Seconds that an interrupted command gets to finish its step and to save."""
FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
ELSEWHERE = 1.0
"""Seconds between two looks at cells that another runner holds."""
LAST_MOMENTS = 5.0
"""Seconds that the process of an engine may live on after it has killed the commands that it had started."""


class StopRequest:
    """Whether, and how urgently, the user or the system asks to stop: SIGINT, SIGTERM or SIGHUP, counted."""

    def __init__(self) -> None:
        self.count = 0
        self.number: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.signal(number, self._ask) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def ask(self, number: int = signal.SIGINT) -> None:
        """Stop gently; the second time at once."""
        self.count += 1
        self.number = self.number or number

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.ask(number)


@dataclass
class Running:
    """A cell at work.

    Attributes:
        folder: Of the cell.
        lock: Its lock.
        slot: Position of what it computes on.
        stage: First word of the current command.
        process: The current command.
        started: When the attempt began.
        asked: When it was asked to stop; None: not yet.
    """

    folder: CellFolder
    lock: int
    slot: int
    stage: str
    process: Process
    started: float
    asked: float | None = None


class LocalLauncher:
    """Runs cells as processes of this machine.

    Args:
        slots: Environment of each of the cells that run at the same time: its GPUs, its threads.
        starter: Starts the commands; by default afresh.
        stop: Asked whether to stop.
        patience: Seconds that pass before a killed command counts as failed. When Ray loses a machine, its processes
            there kill the command first and themselves next: the cell is not to be noted as failed in between.
    """

    def __init__(
        self,
        slots: Sequence[Mapping[str, str]],
        starter: Starter | None = None,
        stop: StopRequest | None = None,
        patience: float = 0,
    ) -> None:
        self.slots = list(slots)
        self.starter = starter or PlainStarter()
        self.stop = stop or StopRequest()
        self.patience = patience
        self.reason: str | None = None
        self._free = list(range(len(self.slots)))
        self._running: list[Running] = []
        self._begun = now()
        self._next_look: dict[str, float] = {}

    def run(self, folders: Sequence[CellFolder], tick: Tick = lambda: None) -> None:
        """Run what is not done; returns when all cells have been tried, here or by others, or after a request to stop.

        A cell that fails never ends the others, but a full disk lets no new one start (`reason` then says so).

        Raises:
            InputError: A folder cannot be written.
        """
        left = list(folders)
        try:
            with self.stop.listening():
                while True:
                    self._reap()
                    self._pass_on_stop()
                    if not self.stop.count and self.reason is None:
                        left = self._fill(left)
                    tick()
                    if not self._running and (not left or self.stop.count or self.reason is not None):
                        return
                    self.starter.wait(0.1)
        except OSError as error:
            raise InputError(f"{error.filename or folders[0].path.parent}: cannot write ({error.strerror})") from error
        finally:
            self._kill_all()
            self.starter.close()

    def drain(self) -> None:
        """Stop gently, and return when the commands have ended: for a signal handler that interrupts `run`."""
        self.stop.ask()
        while self._running:
            self._pass_on_stop()
            self._reap()
            self.starter.wait(0.1)

    # ---- starting ----

    def _fill(self, left: list[CellFolder]) -> list[CellFolder]:
        """Start cells on free slots; returns those that are still to be looked at."""
        kept = []
        for folder in left:
            if not self._free or time.monotonic() < self._next_look.get(str(folder.path), 0):
                kept.append(folder)
            elif not self._take(folder):
                self._next_look[str(folder.path)] = time.monotonic() + ELSEWHERE
                kept.append(folder)
        return kept

    def _take(self, folder: CellFolder) -> bool:
        """Start a cell, or find that there is nothing to do; False while another runner has it."""
        lock = folder.lock()
        if lock is None:
            return False
        state = folder.read()
        if state["status"] == "done" or (state["status"] == "failed" and (state["ended"] or "") >= self._begun):
            os.close(lock)
            return True
        started = time.monotonic()
        try:
            folder.begin()
            stage = folder.next_stage()
            if stage is None:
                folder.end("done", 0)
                os.close(lock)
                return True
            slot = self._free.pop(0)
            process = self._start(folder, stage, slot, lock)
        except BaseException:
            os.close(lock)
            raise
        self._running.append(Running(folder, lock, slot, stage[0], process, started))
        return True

    def _start(self, folder: CellFolder, stage: tuple[str, ...], slot: int, lock: int) -> Process:
        state = folder.read()
        environment = dict(self.slots[slot])
        if stage[0] == "fit" or len(state["stages"]) == 1:
            environment[AXES_VARIABLE] = json.dumps(state["axes"] | {"seed": state["seed"]})
        with folder.log.open("a") as log:
            log.write(f"$ {shell_line(stage)}\n")
        log_path = str(folder.log.absolute())
        return self.starter.start(Job(stage, log_path, state["cwd"], environment), lock)

    # ---- ending ----

    def _reap(self) -> None:
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            try:
                self._ended(running, code)
            except BaseException:
                self._release(running)
                raise

    def _ended(self, running: Running, code: int) -> None:
        folder = running.folder
        if code == 0:
            finished = folder.read().get("finished_stages", [])
            folder.update(finished_stages=[*finished, running.stage])
            stage = folder.next_stage()
            if stage is not None and running.asked is None and not self.stop.count:
                running.stage = stage[0]
                running.process = self._start(folder, stage, running.slot, running.lock)
                self._running.append(running)
                return
            status, error = ("done", None) if stage is None else ("interrupted", None)
        elif running.asked is not None or self.stop.count:
            status, error = "interrupted", None
        else:
            status, error = "failed", self._error(folder, code)
        folder.end(status, time.monotonic() - running.started, code, error)
        self._release(running)

    def _error(self, folder: CellFolder, code: int) -> str:
        error = folder.log_tail()
        if any(text in error for text in FULL_DISK):
            self.reason = "the disk is full, so no more cells are started"
        if code < 0:
            time.sleep(self.patience)
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            error = f"killed by {name}{hint}\n{error}".rstrip()
        return error or f"exit status {code}, and an empty log"

    def _release(self, running: Running) -> None:
        self._free = sorted([*self._free, running.slot])
        os.close(running.lock)

    # ---- stopping ----

    def _pass_on_stop(self) -> None:
        """The first time let commands save; the second time, or after `GRACE`, kill them."""
        for running in self._running if self.stop.count else []:
            if running.asked is None:
                running.asked = time.monotonic()
                running.process.signal(signal.SIGINT)
            elif self.stop.count > 1 or time.monotonic() - running.asked > GRACE:
                running.process.signal(signal.SIGKILL)

    def _kill_all(self) -> None:
        """After an error: nothing goes on without a runner. The cells resume from their last checkpoints."""
        for running in self._running:
            running.process.signal(signal.SIGKILL)
        for running in self._running:
            while running.process.poll() is None:
                self.starter.wait(0.1)
            with contextlib.suppress(OSError):
                running.folder.end("interrupted", time.monotonic() - running.started, None)
            os.close(running.lock)
        self._running = []


def run_cell(path: str, environment: Mapping[str, str], command: Sequence[str] = COMMAND) -> str:
    """Run one cell here to its end, wherever here is: what other machines execute. Returns its status.

    Args:
        path: Of the cell's folder.
        environment: For its commands.
        command: What gets their arguments.
    """
    folder = CellFolder(Path(path))
    LocalLauncher([environment], PlainStarter(command), patience=LAST_MOMENTS).run([folder])
    return str(folder.read()["status"])


def python_path() -> str:
    return os.pathsep.join(dict.fromkeys([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])]))


def unfinished(folders: Sequence[CellFolder]) -> list[CellFolder]:
    return [folder for folder in folders if folder.read().get("status") != "done"]


def note_loss(folder: CellFolder, error: str) -> None:
    """A cell whose machine went away for good is failed, unless it runs elsewhere by now."""
    with folder.locked() as lock:
        if lock is not None and folder.read().get("status") in ("running", "pending"):
            folder.end("failed", 0, None, f"lost: {error.strip().splitlines()[-1]}"[:500])
