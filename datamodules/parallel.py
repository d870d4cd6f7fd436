"""One function over many files: in several processes where that pays, with a line about how far it is."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from detector.training.progress_line import watched

Item = TypeVar("Item")
Result = TypeVar("Result")

PARALLEL_FROM = 1000  # items; starting processes takes longer than reading fewer files
MAX_PROCESSES = 8


def map_files(
    function: Callable[[Item], Result], items: Sequence[Item], what: str, parallel_from: int | None = None
) -> list[Result]:
    """Return `[function(item) for item in items]`, and say on standard error how far it is.

    The function is defined at the top of a module, is cheap to start and has no side effects; it, the items and the
    results are pickled. Other processes are started from `parallel_from` items on; by default PARALLEL_FROM.
    """
    with _results(function, items, PARALLEL_FROM if parallel_from is None else parallel_from) as (results, chunk):
        return list(watched(results, len(items), what, "files", chunk))


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends, even by SIGKILL; both through multiprocessing.

    If it leads a process group, that is killed with it.
    """
    kill = os.killpg if os.getpgrp() == os.getpid() else os.kill
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stopped_by_sigterm() -> Iterator[Callable[[], None]]:
    """Give a function that ends the process, with the status of shells, if SIGTERM has come; only in the main thread.

    It is called where nothing is half done. A handler that raises does so anywhere: while Python forks, the exception
    is lost; within `subprocess`, a lock may stay taken.
    """
    came: list[int] = []

    def check() -> None:
        if came:
            raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_signals_to_parent() -> None:
    """Let nothing but the parent end this process before its time.

    A terminal and SLURM send signals to all processes of a training, which has to finish its step with its workers.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _results(
    function: Callable[[Item], Result], items: Sequence[Item], parallel_from: int
) -> Iterator[tuple[Iterable[Result], int]]:
    """Give the results, and how many come at a time."""
    processes = min(available_cores(), MAX_PROCESSES)
    if len(items) < parallel_from or processes < 2 or multiprocessing.current_process().daemon:
        yield map(function, items), 1
        return
    # As data loaders do, so that a script without `if __name__ == "__main__"` works too. The children only read files.
    method = "fork" if sys.platform == "linux" else None
    context = multiprocessing.get_context(method)
    # Not `multiprocessing.Pool`: it ends its processes by force, and waits for ever if one of them held a lock.
    executor = ProcessPoolExecutor(processes, context, _begin)
    chunk = max(1, min(100, len(items) // (4 * processes)))
    try:
        yield executor.map(function, items, chunksize=chunk), chunk
    finally:
        executor.shutdown(cancel_futures=True)


def _begin() -> None:
    """Leave interrupts and their handlers to the parent; without it there is nothing to do."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
