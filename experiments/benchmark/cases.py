"""`frcnn benchmark KIND`: times of this code beside those of a peer, measured in one run."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter

from experiments.output import json_text


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
        mb_per_image, peer_mb_per_image: What each further image of a batch adds to it.
        images_per_gib, peer_images_per_gib: How many further images fit into a GiB.
        detector_ms: Time of those of the parts that are the detector's own.
        value: Of what a sweep varies.
        efficiency: Images per second of several devices, in units of what as many times one would do.
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
    mb_per_image: float | None = None
    peer_mb_per_image: float | None = None
    images_per_gib: float | None = None
    peer_images_per_gib: float | None = None
    detector_ms: float | None = None
    value: int | None = None
    efficiency: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        return None if self.peer_ms is None else self.peer_ms / self.ours_ms


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measured, on what, and with which input; `notes` say in words what the cases show together."""

    title: str
    device: str
    cases: Sequence[Case]
    packages: Sequence[str] = ("torch", "numpy")
    notes: Sequence[str] = ()


def print_benchmark(benchmark: Benchmark, format: str) -> None:
    """Print as a table, or as JSON with the keys `device`, `versions`, `cases`, `title` and `notes`."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in benchmark.packages}}
    if format == "json":
        cases = [{**asdict(case), "ratio": case.ratio} for case in benchmark.cases]
        head = {"title": benchmark.title, "device": benchmark.device, "versions": versions}
        print(json_text({**head, "cases": cases, "notes": benchmark.notes}))
        return
    print(benchmark.title)
    print(f"{benchmark.device}; " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    for case in benchmark.cases:
        print("\n" + "\n  ".join(_lines(case)))
    if benchmark.notes:
        print("\n" + "\n".join(benchmark.notes))


def _lines(case: Case) -> list[str]:
    """A case in words; all lines but the first are its details."""

    def beside(ours: float, peer: float | None, unit: str = "") -> str:
        other = "" if peer is None else f", {case.peer} {_number(peer)}{unit}"
        return f"{_number(ours)}{unit}{other}"

    digits = 0 if case.ours_ms >= 20 else 2
    peer = "" if case.peer_ms is None else f", {case.peer} {case.peer_ms:.{digits}f} ms: {case.ratio:.{digits or 1}f}x"
    lines = [f"{case.name}: {case.ours_ms:.{digits}f} ms{peer}"]
    if case.ours_per_s is not None:
        lines.append(f"per second: {beside(case.ours_per_s, case.peer_per_s)}")
    if case.efficiency is not None:
        lines.append(f"efficiency against one device: {case.efficiency:.2f}")
    if case.times_the_limit is not None and case.parts:
        lines.append(f"{case.times_the_limit:.2f} times backbone and box head alone")
    if case.parts:
        lines.append("parts: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in case.parts.items()))
    if case.ours_peak_mb is not None:
        lines.append(f"peak memory beyond the input: {beside(case.ours_peak_mb, case.peer_peak_mb, ' MB')}")
    if case.mb_per_image is not None:
        lines.append(f"memory of each further image: {beside(case.mb_per_image, case.peer_mb_per_image, ' MB')}")
    if case.images_per_gib is not None:
        lines.append(f"further images per GiB: {beside(case.images_per_gib, case.peer_images_per_gib)}")
    return lines


def _number(value: float) -> str:
    """Three digits at least."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


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


def start_peak() -> float | None:
    """Forget the peak of memory so far; returns the memory in use in MB, or None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident_memory("VmRSS")


def resident_memory(key: str) -> float | None:
    """MB of memory in use, `VmRSS`, or its peak, `VmHWM`, of this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


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
