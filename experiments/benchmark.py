"""`frcnn benchmark KIND`: times of this code beside those of a peer, measured in one run."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: What is measured.
        ours_ms: Median time of this code.
        peer_ms: Median time of the peer, or None without one.
        parts: Share of each part of `ours_ms`.
        peer: What the peer is.
        ours_per_s, peer_per_s: How many a second, where the times are those of one of many.
        times_the_limit: `ours_ms` in units of what cannot be avoided.
        ours_peak_mb, peer_peak_mb: Memory that the measured code needs at its peak beyond its input.
    """

    name: str
    ours_ms: float
    peer_ms: float | None
    parts: dict[str, float] = field(default_factory=dict)
    peer: str = ""
    ours_peak_mb: float | None = None
    peer_peak_mb: float | None = None
    ours_per_s: float | None = None
    peer_per_s: float | None = None
    times_the_limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        return None if self.peer_ms is None else self.peer_ms / self.ours_ms


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measured, on what, and with which input."""

    title: str
    device: str
    cases: Sequence[Case]
    packages: Sequence[str] = ("torch", "numpy")


def print_benchmark(benchmark: Benchmark, format: str) -> None:
    """Print as a table, or as JSON with the keys `device`, `versions`, `cases`, and `title`."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in benchmark.packages}}
    if format == "json":
        cases = [{**asdict(case), "ratio": case.ratio} for case in benchmark.cases]
        document = {"title": benchmark.title, "device": benchmark.device, "versions": versions, "cases": cases}
        print(json.dumps(document, indent=2))
        return
    print(benchmark.title)
    print(f"{benchmark.device}; " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    for case in benchmark.cases:
        digits = 0 if case.ours_ms >= 20 else 2
        peer = (
            "" if case.peer_ms is None else f", {case.peer} {case.peer_ms:.{digits}f} ms: {case.ratio:.{digits or 1}f}x"
        )
        print(f"\n{case.name}: {case.ours_ms:.{digits}f} ms{peer}")
        if case.ours_per_s is not None:
            peer = "" if case.peer_per_s is None else f", {case.peer} {case.peer_per_s:.0f}"
            print(f"  per second: {case.ours_per_s:.0f}{peer}")
        if case.times_the_limit is not None and case.parts:
            print(f"  {case.times_the_limit:.2f} times backbone and box head alone")
        if case.parts:
            print("  parts: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in case.parts.items()))
        if case.ours_peak_mb is not None:
            peer = "" if case.peer_peak_mb is None else f", {case.peer} {case.peer_peak_mb:.0f} MB"
            print(f"  peak memory beyond the input: {case.ours_peak_mb:.0f} MB{peer}")


def timed(parts: Sequence[tuple[str, Callable[[], object]]]) -> dict[str, float]:
    """Run each part once, in order; milliseconds by name."""
    times: dict[str, float] = {}
    for name, run in parts:
        start = perf_counter()
        run()
        times[name] = times.get(name, 0.0) + 1000 * (perf_counter() - start)
    return times


def median_times(repeats: Sequence[dict[str, float]]) -> tuple[float, dict[str, float]]:
    """Median total of several `timed` results, and each part's share of the summed time."""
    total = sum(sum(times.values()) for times in repeats)
    shares = {name: sum(times[name] for times in repeats) / total for name in repeats[0]}
    return median(sum(times.values()) for times in repeats), shares


def processor() -> str:
    """The processor's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
