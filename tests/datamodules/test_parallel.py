import io
import os
import sys
import time

import pytest

from datamodules import parallel
from datamodules.parallel import map_files


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
    monkeypatch.setattr(parallel, "_cores", lambda: 3)


def test_order_is_kept_over_processes(three_processes):
    results = map_files(slow_square, range(350), "squares")
    assert [square for square, _ in results] == [number * number for number in range(350)]
    assert os.getpid() not in {process for _, process in results}


def test_few_files_need_no_processes(three_processes):
    assert {process for _, process in map_files(slow_square, range(99), "squares")} == {os.getpid()}


def test_exceptions_come_through(three_processes):
    with pytest.raises(ValueError, match="number 0"):
        map_files(fail, range(200), "failing")


def test_bar_only_for_many_files_on_a_terminal(monkeypatch):
    for count, stream, drawn in ((300, Terminal(), True), (299, Terminal(), False), (300, io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert len(map_files(slow_square, range(count), "reading things")) == count
        assert ("reading things" in stream.getvalue()) == drawn
