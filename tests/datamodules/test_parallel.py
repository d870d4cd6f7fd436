import io
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from datamodules import parallel
from datamodules.parallel import map_files
from detector.training import progress_line as progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.001 * (number % 7))  # later ones are often ready first
    return number * number, os.getpid()


def fail(number: int) -> int:
    raise ValueError(f"number {number}")


@pytest.fixture
def three_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PARALLEL_FROM", 100)
    monkeypatch.setattr(parallel, "available_cores", lambda: 3)


def test_order_is_kept_over_processes(three_processes):
    results = map_files(slow_square, range(350), "squares")
    assert [square for square, _ in results] == [number * number for number in range(350)]
    assert os.getpid() not in {process for _, process in results}


def test_few_files_need_no_processes(three_processes):
    assert {process for _, process in map_files(slow_square, range(99), "squares")} == {os.getpid()}


@pytest.mark.timeout(120)
def test_exceptions_come_through(three_processes):
    for _ in range(50):  # `multiprocessing.Pool` waits for ever in one of some hundred
        with pytest.raises(ValueError, match="number 0"):
            map_files(fail, range(200), "failing")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent was killed")
def test_processes_do_not_outlive_a_killed_parent(wait_for):
    script = (
        "import time; from datamodules import parallel; parallel.available_cores = lambda: 3\n"
        "parallel.map_files(time.sleep, [0.01] * 6000, 'sleeping', 100)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_for(lambda: len(children(parent.pid)) == 3)
        workers = children(parent.pid)
        parent.kill()
    wait_for(lambda: not any(map(runs, workers)))


def children(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def runs(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_line_about_work_of_more_than_a_second_on_a_terminal(three_processes, monkeypatch):
    """The first chunk is whole when its first result comes: 29 of 350 items."""
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=itertools.count(0, 2).__next__))
        assert len(map_files(slow_square, range(350), "reading things")) == 350
        assert ("reading things 29/350" in stream.getvalue()) == drawn
