"""Processes of a benchmark's own: started afresh, ended together, and never waited for without end."""

import logging
import math
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from datamodules.parallel import end_with_parent


class ProcessFailed(RuntimeError):
    """A process failed or took too long; the message is one line."""


def run_processes(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], seconds: float = math.inf
) -> list[Any]:
    """Run `function(*arguments)` in one new process for each tuple, all at the same time, and return what they return.

    All end with the first that fails, with this process, and after so many seconds. The function is importable by its
    name, as spawned processes demand.

    Raises:
        ProcessFailed: One raised something, died, or took longer.
    """
    # It would tell of each process that it ends.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    end = monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder) / str(rank) for rank in range(len(arguments))]
        group = start_processes(
            _work, (function, arguments, answers), len(arguments), join=False, daemon=True, start_method="spawn"
        )
        try:
            while not group.join(None if seconds == math.inf else max(0.0, end - monotonic())):
                if monotonic() >= end:
                    rank = next(rank for rank, process in enumerate(group.processes) if process.is_alive())
                    raise ProcessFailed(f"process {rank + 1} of {len(arguments)} took longer than {seconds:g} s")
        except ProcessExitedException as error:
            answer, code = answers[error.error_index], error.exit_code
            cause = f"ended with exit status {code}"
            if answer.is_file():
                cause = answer.read_text()
            elif code < 0:
                hint = ", as for want of memory" if -code == signal.SIGKILL else ""
                cause = f"was ended by signal {signal.Signals(-code).name}{hint}"
            raise ProcessFailed(f"process {error.error_index + 1} of {len(arguments)} {cause}") from None
        finally:
            for process in group.processes:
                process.kill()
                process.join()
        return [pickle.loads(answer.read_bytes()) for answer in answers]


def _work(
    rank: int, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], answers: Sequence[Path]
) -> None:
    """Call in the new process, and write the result, or what went wrong."""
    end_with_parent()  # torch sends SIGINT, which a shell's background processes ignore
    try:
        result = function(*arguments[rank])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        answers[rank].write_text(f"failed: {type(error).__name__}: {lines[0]}".rstrip(": "))
        os._exit(1)  # at once: an orderly end may wait for processes that wait for this one
    answers[rank].write_bytes(pickle.dumps(result))
