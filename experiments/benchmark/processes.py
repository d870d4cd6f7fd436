"""Processes of a benchmark's own: started afresh, ended together, and never waited for without end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, Final

GRACE: Final = 1.0
"""Seconds in which further failures are waited for: the first to be heard of may be but a consequence."""


class ProcessFailed(RuntimeError):
    """A process failed or took too long; the message is one line."""


def run_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
    """Run `function(*arguments)` in one new process for each tuple, all at the same time, and return what they return.

    All end with the first that fails, and with this process.

    Args:
        function: Importable by its name, as spawned processes demand.
        arguments: Of each process.
        seconds: After which those that have not returned are ended.

    Raises:
        ProcessFailed: One raised something, died, or took longer.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for own in arguments:
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_work, args=(sender, function, own), daemon=True)
            process.start()
            sender.close()  # so that the end of the process is the end of the pipe
            processes.append(process)
            pipes.append(receiver)
        return _results(processes, pipes, seconds)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _results(processes: Sequence[BaseProcess], pipes: Sequence[Connection], seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[bool, str]] = []  # whether the process died without a word, and what happened
    pending = set(range(len(pipes)))
    end = monotonic() + seconds
    while pending:
        heard = wait([pipes[number] for number in pending], max(0.0, end - monotonic()))
        if not heard:
            break
        for number in [number for number in sorted(pending) if pipes[number] in heard]:
            pending.remove(number)
            who = f"process {number + 1} of {len(pipes)}"
            try:
                failed, value = pipes[number].recv()
            except EOFError:
                processes[number].join()
                failures.append((True, f"{who} {_ending(processes[number].exitcode)}"))
                continue
            if failed:
                failures.append((False, f"{who} failed: {value}"))
            else:
                results[number] = value
        if failures:
            end = min(end, monotonic() + GRACE)
    if failures:
        raise ProcessFailed(max(failures, key=lambda failure: failure[0])[1])
    if pending:
        raise ProcessFailed(f"process {min(pending) + 1} of {len(pipes)} took longer than {seconds:g} s")
    return [results[number] for number in range(len(pipes))]


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        cause = ", as for want of memory" if -code == signal.SIGKILL else ""
        return f"was ended by signal {signal.Signals(-code).name}{cause}"
    return f"ended with exit status {code}"


def _work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: call, and send (whether it failed, result or one line)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = False, function(*arguments)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        pipe.send((True, f"{type(error).__name__}: {lines[0]}".rstrip(": ")))
        os._exit(1)  # at once: an orderly end may wait for processes that wait for this one
    pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
