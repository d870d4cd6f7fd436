"""Times in turn, of parts, and memory at its peak."""

import mmap
from typing import Any

import pytest

from experiments.benchmark import measuring
from experiments.benchmark.measuring import CPU, Clock, median_parts_in_turn, median_times, peak_memory, used_memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which stands still unless a test changes it."""
    now = [0.0]
    monkeypatch.setattr(measuring, "perf_counter", lambda: now[0])
    return now


def test_runs_in_turn(clock: list[float]) -> None:
    """Ten seconds a round: one of warm-up, then three, every other one backwards."""
    order: list[str] = []
    spent = {"a": iter([4.0, 1.0, 2.0, 3.0]), "b": iter([6.0, 9.0, 8.0, 4.0])}

    def run(name: str) -> Any:
        order.append(name)
        clock[0] += next(spent[name])

    assert median_times([lambda: run("a"), lambda: run("b")], CPU, 3) == [2000, 8000]
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


@pytest.mark.parametrize(("duration", "rounds"), [(0.25, 2 + 12), (0.01, 2 + 15), (2.0, 2 + 3)])
def test_short_rounds_are_more(clock: list[float], duration: float, rounds: int) -> None:
    """Up to five times the three that are asked for, until they fill three seconds."""
    count = [0]

    def run() -> None:
        count[0] += 1
        clock[0] += duration

    median_times([run], CPU, 3)
    assert count[0] == rounds


def test_parts(clock: list[float]) -> None:
    """The first round is warm-up; a part that comes twice is counted twice."""
    extra = iter([9.0, 0.001, 0.005, 0.002])

    def run() -> dict[str, float]:
        timer = Clock()
        for part, time in (("a", 0.001), ("b", next(extra)), ("a", 0.003)):
            with timer(part):
                clock[0] += time
        return timer.times

    (parts,) = median_parts_in_turn([run], 3)
    assert parts == pytest.approx({"a": 4, "b": 2})


def test_memory_at_its_peak() -> None:
    def touch() -> None:
        with mmap.mmap(-1, 64 * 2**20) as area:  # from the system, not what an allocator has kept
            for _ in range(64):
                area.write(b"x" * 2**20)

    before = used_memory(CPU)
    if before is None:
        pytest.skip("this system does not tell")
    peak = peak_memory(touch, CPU)
    if peak is None:
        pytest.skip("this system does not let the peak be forgotten")
    assert 63 < peak - before < 100
