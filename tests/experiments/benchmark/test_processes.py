"""Processes of a benchmark's own: what they return, and how they fail."""

import multiprocessing
import os
import subprocess
import sys
import time
from operator import truediv
from pathlib import Path

import pytest

from experiments.benchmark.processes import ProcessFailed, run_processes


def test_processes_return_in_order() -> None:
    assert run_processes(truediv, [(6, 3), (8, 2)], 100) == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "seconds", "words"),
    [
        ([(100,), (-1,)], 200, "process 2 of 2 failed: ValueError: sleep length must be non-negative"),
        ([(100,), (0,)], 2, "process 1 of 2 took longer than 2 s"),
    ],
)
def test_a_failing_process_ends_all(arguments: list[tuple[int]], seconds: float, words: str) -> None:
    with pytest.raises(ProcessFailed, match=words):
        run_processes(time.sleep, arguments, seconds)
    assert multiprocessing.active_children() == []  # also those that had 100 s to sleep


@pytest.mark.parametrize(
    ("function", "own", "words"),
    [
        (os._exit, (3,), "process 1 of 1 ended with exit status 3"),
        (os.abort, (), "process 1 of 1 was ended by signal SIGABRT"),
    ],
)
def test_a_process_that_dies(function, own: tuple[int, ...], words: str) -> None:
    with pytest.raises(ProcessFailed) as failure:
        run_processes(function, [own], 200)
    assert str(failure.value) == words


def test_processes_end_with_the_one_that_started_them(tmp_path: Path, wait_for) -> None:
    """Also where it is killed, and where SIGINT is ignored, as in a shell's background."""
    (tmp_path / "program.py").write_text(
        "import os, pathlib, signal, time\n"
        "from experiments.benchmark.processes import run_processes\n"
        "def sleep():\n"
        "    pathlib.Path('draft').write_text(str(os.getpid()))\n"
        "    os.replace('draft', 'pid')\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    run_processes(sleep, [()])\n"
    )
    root = Path(__file__).resolve().parents[3]
    parent = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, text=True
    )
    wait_for((tmp_path / "pid").exists, parent)
    process = Path("/proc") / (tmp_path / "pid").read_text()
    parent.kill()
    parent.wait()
    wait_for(lambda: not process.exists() or "State:\tZ" in (process / "status").read_text())
