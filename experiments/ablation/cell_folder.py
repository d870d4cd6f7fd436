"""A cell's folder: its state in `cell.json`, its lock, and what of it is left to do.

The lock is the kernel's (flock): held by whoever runs the cell and by the cell's own process, and free again the moment
both are gone, whatever ended them. So `running` in a `cell.json` that nobody locks means killed.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detector.errors import InputError
from detector.files import read_cell, read_metrics, write_json

State = dict[str, Any]
LOG_LINES = 6
"""Lines of a failed cell's log that are shown."""


@dataclass(frozen=True)
class CellFolder:
    """The run folder of one cell of a grid.

    Attributes:
        path: The folder. `cell.json` holds name, axes, seed, hash, `status` (pending, running, done, failed,
            interrupted), attempts, host, pid, started, ended, seconds (of all attempts), exit_code, error, command, and
            what a runner on another machine needs: `stages`, `finished_stages`, `cwd`, `steps`.
    """

    path: Path

    @property
    def log(self) -> Path:
        """Return the file of everything that the cell's commands print, all attempts after one another."""
        return self.path / "cell.log"

    def read(self) -> State:
        """Return the state; an empty one if there is none."""
        return _there(read_cell(self.path / "cell.json"))

    def metrics(self) -> State:
        """Return the run's final numbers, as far as they are there."""
        return _there(read_metrics(self.path / "metrics.json"))

    def progress(self) -> State:
        """Return step and last validation of a training that goes on; `CellProgress` writes them."""
        return _there(read_metrics(self.path / "cell.progress.json"))

    @property
    def is_done(self) -> bool:
        """Return whether nothing is left to do."""
        return bool(self.read().get("status") == "done")

    @property
    def attempts(self) -> int:
        """Return how often the cell was begun."""
        return int(self.read().get("attempts") or 0)

    def update(self, **changes: Any) -> None:
        """Change some of the state; on disk is either the old one or the new one."""
        write_json(self.path / "cell.json", self.read() | changes)

    def create(self, state: State) -> None:
        """Make the folder with its first state, unless it is there already.

        Raises:
            InputError: Another cell is in this folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked() as lock:
            before = self.read()
            if before.get("hash", state["hash"]) != state["hash"]:
                raise InputError(f"{self.path}: holds another cell (hash {before.get('hash')}); move it away")
            if lock is not None:
                # Commands may be written differently today, for the same options.
                fixed = ("stages", "command", "cwd", "steps", "name", "axes")
                kept = {key: value for key, value in before.items() if key not in fixed}
                if before != state | kept:
                    write_json(self.path / "cell.json", state | kept)

    @contextlib.contextmanager
    def locked(self) -> Iterator[int | None]:
        """Hold the lock for a moment; give None if another holds it."""
        lock = self.lock()
        try:
            yield lock
        finally:
            if lock is not None:
                os.close(lock)

    def lock(self) -> int | None:
        """Return a file descriptor that holds the cell until all its copies are closed; None if another has it."""
        descriptor = os.open(self.path / "cell.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    # ---- what is left to do; for the holder of the lock ----

    def finish(self, stage: str) -> tuple[str, ...] | None:
        """Note that a command has ended well; return the arguments of the next one."""
        self.update(finished_stages=[*(self.read().get("finished_stages") or []), stage])
        return self.next_stage()

    def next_stage(self) -> tuple[str, ...] | None:
        """Return the arguments of the next command, which goes on where an attempt stopped; None if all is done.

        Raises:
            InputError: The state was damaged since the runner began.
        """
        state, metrics = self.read(), self.metrics()
        if "stages" not in state:
            raise InputError(f"{self.path / 'cell.json'}: is damaged; the same command again mends it")
        finished = set(state.get("finished_stages") or [])
        for stage in map(tuple, state["stages"]):
            if stage[0] in finished:
                continue
            if stage[0] == "fit":
                return self._resumed() or self._afresh(stage)
            if len(state["stages"]) == 1:  # an evaluation alone
                return self._afresh(stage)
            if stage[0] == "test":
                # A training that was killed between its last checkpoint and its end did not write these.
                if "validate" not in finished and not any(name.startswith("val/") for name in metrics):
                    return ("validate", *stage[1:])
                if "test_checkpoint" in metrics:  # killed after the test: a second one would count as such
                    continue
            return stage
        return None

    def _resumed(self) -> tuple[str, ...] | None:
        config, checkpoints = self.path / "config.yaml", self.path / "checkpoints"
        if not (config.is_file() and checkpoints.is_dir()):
            return None
        from detector.training.checkpoint_content import newest_checkpoint  # not before: takes seconds

        try:
            newest = newest_checkpoint(checkpoints)
        except InputError:  # all are damaged
            return None
        return None if newest is None else ("fit", f"--config={config}", f"--ckpt_path={newest}")

    def _afresh(self, stage: tuple[str, ...]) -> tuple[str, ...]:
        for path in self.path.iterdir():
            if path.name.startswith("cell.") and path.name != "cell.progress.json":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return stage

    # ---- the attempt ----

    def begin(self) -> None:
        """Note that an attempt starts here and now."""
        for path in self.path.rglob("*.partial"):  # of a process that was killed while it wrote
            path.unlink()
        self.update(
            status="running",
            attempts=self.attempts + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=now(),
            ended=None,
            exit_code=None,
            error=None,
        )

    def end(self, status: str, seconds: float, exit_code: int | None = 0, error: str | None = None) -> None:
        """Note how an attempt ended."""
        before = self.read().get("seconds") or 0
        self.update(
            status=status, ended=now(), seconds=round(before + seconds, 3), exit_code=exit_code, error=error, pid=None
        )

    def note_loss(self, error: str) -> None:
        """Note that the machine of the cell went away for good, unless it runs elsewhere by now."""
        with self.locked() as lock:
            if lock is not None and self.read().get("status") in ("running", "pending"):
                self.end("failed", 0, None, f"lost: {error.strip().splitlines()[-1]}"[:500])

    def log_tail(self) -> str:
        """Return the last lines of the log of the latest command."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        starts = [index for index, line in enumerate(lines) if line.startswith("$ ")]
        return "\n".join(lines[starts[-1] + 1 if starts else 0 :][-LOG_LINES:])


def shell_line(stage: Sequence[str]) -> str:
    """Return a command as one would type it."""
    return " ".join(["frcnn", *map(shlex.quote, stage)])


def now() -> str:
    """Return the time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _there(content: State | str) -> State:
    return content if isinstance(content, dict) else {}
