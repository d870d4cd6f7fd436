"""Processes of a benchmark's own: started afresh, ended together, and never waited for without end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any


class ProcessFailed(RuntimeError):
    """A process failed or took too long; the message is one line."""


def run_processes(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], seconds: float | None = None
) -> list[Any]:
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
    pipes = [context.Pipe(duplex=False) for _ in arguments]
    processes = [
        context.Process(target=_work, args=(sender, function, own), daemon=True)
        for (_, sender), own in zip(pipes, arguments, strict=True)
    ]
    results: dict[int, Any] = {}
    end = None if seconds is None else monotonic() + seconds
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # so that the end of the process is the end of the pipe
        while len(results) < len(processes):
            pending = {pipe: number for number, (pipe, _) in enumerate(pipes) if number not in results}
            heard = wait(pending, None if end is None else max(0.0, end - monotonic()))
            if not heard:
                raise ProcessFailed(f"{_name(min(pending.values()), processes)} took longer than {seconds:g} s")
            for pipe in heard:
                number = pending[pipe]  # type: ignore[index]
                try:
                    failed, results[number] = pipes[number][0].recv()
                except EOFError:
                    processes[number].join()
                    failed, results[number] = True, _ending(processes[number].exitcode)
                if failed:
                    raise ProcessFailed(f"{_name(number, processes)} {results[number]}")
        return [results[number] for number in range(len(processes))]
    finally:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _name(number: int, processes: Sequence[object]) -> str:
    return f"process {number + 1} of {len(processes)}"


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        cause = ", as for want of memory" if -code == signal.SIGKILL else ""
        return f"was ended by signal {signal.Signals(-code).name}{cause}"
    return f"ended with exit status {code}"


def _work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Call in the new process, and send whether it failed, and the result or the end of a line that says why."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = False, function(*arguments)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        pipe.send((True, f"failed: {type(error).__name__}: {lines[0]}".rstrip(": ")))
        os._exit(1)  # at once: an orderly end may wait for processes that wait for this one
    pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
