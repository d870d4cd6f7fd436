"""How a run ends that cannot go on: its cause in one line, from the process that has it, and no other process left."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NoReturn

import pytorch_lightning as pl

from detector.errors import InputError, TrainingError, brief, one_line, printable
from detector.training.callbacks.checkpoints import Interrupted
from detector.training.lightning_private import requeue_signal, when_a_process_fails
from detector.training.processes import end_at_once, share_folder

MEMORY: Final = "; a smaller data.batch_size or model.image.shortest_side, or fewer data.num_workers, need less"
CAUSES: Final = {
    r"DataLoader worker \(pid\S* ([\d, ]+)\) is killed by signal: (\w+)": (
        "a data worker (process {0}) was killed ({1}); if the system did it, memory ran out: set fewer data.num_workers"
    ),
    r"DataLoader worker \(pid\S* ([\d, ]+)\) exited unexpectedly": (
        "a data worker (process {0}) ended unexpectedly; if the system killed it, memory ran out: set fewer "
        "data.num_workers"
    ),
    r"((?:\w+ )?out of memory\. Tried to allocate [^.]*\.[^.]*)\.": "{0}" + MEMORY,
    r"(MemoryError|can't allocate memory|Unable to allocate [^\n]*|bad_alloc)": "memory ran out ({0})" + MEMORY,
}
"""What stands in messages of torch, and the line on it."""
OF_SYSTEM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT, errno.EMFILE}
LOST: Final = r"[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|Application timeout caused pair"
WAIT: Final = 20.0
"""Seconds in which the process that has the cause says it; the others wait for it."""


def cause_of_failure(error: BaseException) -> str | None:
    """Return one line on an error whose cause is outside this program, such as a full disk; None if it may be a bug."""
    if isinstance(error, InputError | TrainingError):
        return one_line(error)
    if isinstance(error, OSError) and error.errno in OF_SYSTEM:
        where = os.fsdecode(error.filename or "a file of the run, of shared memory or of the temporary folder")
        return f"{printable(where)}: {error.strerror}"
    text = f"{type(error).__name__}: {error}"
    for pattern, line in CAUSES.items():
        if found := re.search(pattern, text):
            return line.format(*found.groups())
    return None


@contextlib.contextmanager
def told_in_one_line(trainer: pl.Trainer) -> Iterator[None]:
    """Let what goes wrong inside end in one line and a known exit status, and no process outlive another.

    Raises:
        InputError, TrainingError: For the first process to print.
        SystemExit: In another process, which has printed its line itself, and where one is lost; after Ctrl-C.
    """
    over = threading.Event()
    if trainer.global_rank == 0:
        when_a_process_fails(lambda: over.wait(WAIT) or _end(trainer))
        share_folder(first=True)
    elif "LOCAL_RANK" in os.environ:
        share_folder(first=False)
        threading.Thread(target=_end_with_parent, args=(os.getppid(), trainer.global_rank, over), daemon=True).start()
    excepthook, threading.excepthook = threading.excepthook, _in_thread
    try:
        yield
    except SystemExit as end:
        if isinstance(end, Interrupted) and trainer.is_global_zero and end.number == requeue_signal(trainer):
            _requeue()
        _wait_for(_processes(trainer), all)
        _kill(trainer)
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's, with another status
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    except Exception as error:
        if trainer.world_size > 1 and any(re.search(LOST, str(one)) for one in _chain(error)):
            _wait_for(_processes(trainer), any)
            _end(trainer)
        _kill(trainer)
        found = [(one, text) for one in _chain(error) if (text := cause_of_failure(one))]
        if not found:
            raise
        cause, text = found[0]
        if trainer.global_rank:
            time.sleep(1)  # in which the first process, if it has the same error, ends this one
            print(f"frcnn: rank {trainer.global_rank}: {text}", file=sys.stderr, flush=True)
            raise SystemExit(2 if isinstance(cause, InputError) else 1) from None
        raise (cause if isinstance(cause, InputError | TrainingError) else TrainingError(text)) from error
    finally:
        over.set()
        threading.excepthook = excepthook


def _in_thread(args: threading.ExceptHookArgs) -> None:
    """Leave out what TensorBoard's thread raises where the disk is full: the training hears of it in its next step."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and those behind it, each once: Lightning's own end fails sometimes after another error."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _processes(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the processes that this one has started for other ranks: 1, 2, ..."""
    return getattr(trainer.strategy.launcher, "procs", [])


def _wait_for(processes: Sequence[subprocess.Popen[bytes]], which: Callable[[Iterable[bool]], bool]) -> None:
    """Wait until all, or any, have ended, though not for ever."""
    until = time.monotonic() + WAIT
    while processes and time.monotonic() < until and not which([one.poll() is not None for one in processes]):
        time.sleep(0.1)


def _kill(trainer: pl.Trainer) -> None:
    for process in _processes(trainer):
        process.kill()


def _end(trainer: pl.Trainer) -> NoReturn:
    """End all processes at once, after a line on the one that has failed, and leave no data worker waiting for it."""
    line, code = "the connection to another process of this training is lost, so it ends", 1
    for number, process in enumerate(_processes(trainer), 1):
        if status := process.poll():
            line, code = f"rank {number} (process {process.pid}) ended with exit status {status}", max(status, 1)
            if status < 0:
                hint = ", perhaps because memory ran out" if -status == signal.SIGKILL else ""
                line = f"rank {number} (process {process.pid}) was killed by {signal.Signals(-status).name}{hint}"
            line += ", and so the training ends; checkpoints are as they were"
            break
    _kill(trainer)
    if trainer.global_rank == 0:
        print(f"frcnn: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(WAIT)  # in which the first process, or the launcher of all, ends this one
        print(f"frcnn: rank {trainer.global_rank}: {line}", file=sys.stderr, flush=True)
    end_at_once(code)


def _end_with_parent(parent: int, rank: int, over: threading.Event) -> None:
    while not over.wait(1):
        if os.getppid() != parent and not over.wait(5):
            line = "the process that has started this one has ended, and so this one ends"
            print(f"frcnn: rank {rank}: {line}", file=sys.stderr, flush=True)
            end_at_once(1)


def _requeue() -> None:
    """Put the SLURM job back into the queue, whose script then goes on with the run."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
    name = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
    try:
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=True)
        print(f"SLURM job {name} goes back into the queue{done.stdout.strip() and ': ' + done.stdout.strip()}")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or brief(error)
        print(f"frcnn: scontrol requeue {name}: {reason.strip()}; submit the job again", file=sys.stderr)
