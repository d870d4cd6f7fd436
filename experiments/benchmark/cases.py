"""The results of `frcnn benchmark KIND`, as text or as one JSON document."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from experiments.output import json_text


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: What is measured.
        ours_ms, peer_ms: Median time of this code, and of the peer if there is one.
        parts: Share of each part of `ours_ms`.
        peer: What the peer is.
        number: How many the times are of, where there is a rate: images.
        ours_peak_mb, peer_peak_mb: Memory that the measured code needs at its peak beyond its input.
        mb_per_image, peer_mb_per_image: What each further image of a batch adds to it.
        times_the_limit: `ours_ms` in units of what cannot be avoided.
        detector_ms: Time of those of the parts that are the detector's own.
        value: Of what a sweep varies.
        efficiency: Images per second of several devices, in units of what as many times one would do.
    """

    name: str
    ours_ms: float
    peer_ms: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    peer: str = ""
    number: int | None = None
    ours_peak_mb: float | None = None
    peer_peak_mb: float | None = None
    mb_per_image: float | None = None
    peer_mb_per_image: float | None = None
    times_the_limit: float | None = None
    detector_ms: float | None = None
    value: int | None = None
    efficiency: float | None = None

    @property
    def ratio(self) -> float | None:
        """Return how many times faster it is than the peer."""
        return None if self.peer_ms is None else self.peer_ms / self.ours_ms

    @property
    def ours_per_s(self) -> float:
        """Return how many things there are a second; 0 where the times are not of a number of things."""
        return 1000 * (self.number or 0) / self.ours_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes but `number`, and what follows from them: the ratio, rates, images per GiB."""
        values = asdict(self) | {"ratio": self.ratio}
        number = values.pop("number")
        for side, gib in (("ours", "images_per_gib"), ("peer", "peer_images_per_gib")):
            time, further = values[f"{side}_ms"], values["mb_per_image" if side == "ours" else "peer_mb_per_image"]
            values |= {f"{side}_per_s": time and number and 1000 * number / time, gib: further and 1024 / further}
        return values


@dataclass
class Benchmark:
    """The title, device, cases and notes of a benchmark; the notes say in words what the cases show together.

    With `progress` each case is told on stderr as soon as it is there.
    """

    title: str
    device: str
    packages: Sequence[str] = ("torch", "numpy")
    progress: bool = False
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Add a case; stdout is for the result."""
        self.cases.append(case)
        if self.progress:
            ratio = "" if case.ratio is None else f", {case.ratio:.2f}x {case.peer}"
            print(f"{case.name}: {case.ours_ms:.0f} ms{ratio}", file=sys.stderr)


def print_benchmark(benchmark: Benchmark, format: str) -> None:
    """Print as a table, or as JSON with the keys `device`, `versions`, `cases`, `title` and `notes`."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in benchmark.packages}}
    if format == "json":
        head = {"title": benchmark.title, "device": benchmark.device, "versions": versions}
        cases = [case.to_dict() for case in benchmark.cases]
        print(json_text({**head, "cases": cases, "notes": benchmark.notes}))
        return
    print(benchmark.title)
    print(f"{benchmark.device}; " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    for case in benchmark.cases:
        print("\n" + "\n  ".join(_lines(case)))
    if benchmark.notes:
        print("\n" + "\n".join(benchmark.notes))


def _lines(case: Case) -> list[str]:
    """Return a case in words; all lines but the first are its details."""
    values = case.to_dict()
    digits = 0 if case.ours_ms >= 20 else 2
    peer = "" if case.peer_ms is None else f", {case.peer} {case.peer_ms:.{digits}f} ms: {case.ratio:.{digits or 1}f}x"
    lines = [f"{case.name}: {case.ours_ms:.{digits}f} ms{peer}"]

    def add(words: str, ours: str, peer: str, unit: str = "") -> None:
        if values[ours] is not None:
            other = "" if values[peer] is None else f", {case.peer} {_number(values[peer])}{unit}"
            lines.append(f"{words}: {_number(values[ours])}{unit}{other}")

    add("per second", "ours_per_s", "peer_per_s")
    if case.efficiency is not None:
        lines.append(f"efficiency against one device: {case.efficiency:.2f}")
    if case.times_the_limit is not None and case.parts:
        lines.append(f"{case.times_the_limit:.2f} times backbone and box head alone")
    if case.parts:
        percents = {name: 100 * share for name, share in case.parts.items()}
        lines.append("parts: " + ", ".join(f"{name} {p:.{0 if p >= 1 else 1}f} %" for name, p in percents.items()))
    add("peak memory beyond the input", "ours_peak_mb", "peer_peak_mb", " MB")
    add("memory of each further image", "mb_per_image", "peer_mb_per_image", " MB")
    add("further images per GiB", "images_per_gib", "peer_images_per_gib")
    return lines


def _number(value: float) -> str:
    """Return three digits at least."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
