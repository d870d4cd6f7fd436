"""The ways in which benchmarks measure: times in turn, times of parts, and memory at its peak."""

import gc
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import torch

CPU: Final = torch.device("cpu")
Run = Callable[[], object]
Parts = dict[str, float]


def this_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """Return the processor's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Milliseconds by part. On a GPU each part is waited for."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.times: Parts = {}
        self._device = device

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        synchronize(self._device)
        start = perf_counter()
        yield
        synchronize(self._device)
        self.times[part] = self.times.get(part, 0.0) + 1000 * (perf_counter() - start)


def milliseconds(run: Run, device: torch.device = CPU) -> float:
    """Run, and return how long it took."""
    clock = Clock(device)
    with clock(""):
        run()
    return clock.times[""]


def median_times(runs: Sequence[Run], device: torch.device, repeats: int, seconds: float = 3.0) -> list[float]:
    """Return the median milliseconds of each of `runs`, which run one after the other, round by round.

    One round of warm-up, or two short ones, come before. There are `repeats` rounds, or more where they are short: up
    to five times as many, until all took `seconds`.
    """
    for _ in range(2):
        one_round = sum(milliseconds(run, device) for run in runs) / 1000
        if one_round > 2 * seconds:
            break
    times: list[list[float]] = [[] for _ in runs]
    for number in range(max(repeats, min(5 * repeats, int(seconds / one_round)))):
        for run, own in list(zip(runs, times, strict=True))[:: -1 if number % 2 else 1]:
            own.append(milliseconds(run, device))
    return [median(own) for own in times]


def median_parts(measured: Sequence[Parts]) -> Parts:
    """Return the median milliseconds of each part over several runs."""
    return {part: median(times[part] for times in measured) for part in measured[0]}


def median_parts_in_turn(runs: Sequence[Callable[[], Parts]], repeats: int) -> list[Parts]:
    """Return the median milliseconds of each part of each of `runs`, in turn after one round of warm-up."""
    rounds = [[run() for run in runs] for _ in range(repeats + 1)]
    return [median_parts(own) for own in zip(*rounds[1:], strict=True)]


def shares(parts: Parts) -> Parts:
    """Return each part's share of all."""
    total = sum(parts.values())
    return {part: time / total for part, time in parts.items()}


def used_memory(device: torch.device) -> float | None:
    """Return the MB in use, on the CPU by this process; None where the system does not tell."""
    if device.type == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated(device) / 2**20
    return _resident_memory("VmRSS")


def peak_memory(run: Run, device: torch.device) -> float | None:
    """Run, and return the MB in use at the peak of it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        run()
        return None
    run()
    return _resident_memory("VmHWM")


def _resident_memory(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)
