"""`python -m experiments.benchmark.gpu_check`: every part of the check with its share of the time, and the verdicts."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, Final

from datamodules.parallel import stopped_by_sigterm
from experiments.benchmark.gpu_check import tasks
from experiments.benchmark.gpu_check.limited import GRACE
from experiments.benchmark.gpu_check.record import JSON, MARKDOWN, Record, Values
from experiments.benchmark.gpu_check.tasks import Check, Task

AP50_ON_A_CPU: Final = 0.537
"""Of the VOC2012 subset after 8 epochs, mean of two seeds; see RESULTS.md."""
FASTER: Final = 1.3
MOST_WAIT: Final = 0.05


@dataclass(frozen=True)
class Part:
    """A part of the check: the share of all time that it may take, and the seconds without which it cannot begin."""

    name: str
    share: float
    least: float
    task: Task


def speed(check: Check, seconds: float, rest: bool = False) -> Values:
    """Run the timings, when nothing else runs; they add to the record by themselves."""
    began = monotonic()
    check.written(seconds)
    seconds -= monotonic() - began
    module = "experiments.benchmark.gpu_check.speed"
    command: list[object] = [module, "--output", check.output, "--seconds", max(1.0, seconds - 2 * GRACE)]
    flags = ["--quick"] * check.quick + ["--rest"] * rest
    return check.run([*command, "--accelerator", check.accelerator, *flags], "speed.txt", seconds).values()


PARTS: Final = (
    Part("machine", 0.05, 1, tasks.machine),
    Part("tests", 0.28, 20, tasks.tests),
    Part("speed", 0.27, 30, speed),
    Part("training", 0.36, 60, tasks.training),
    Part("grid", 0.35, 45, tasks.grid),
    Part("more speed", 1.0, 25, lambda check, seconds: speed(check, seconds, rest=True)),
)


def verdicts(parts: dict[str, Values]) -> list[Values]:
    """Return what was to be shown, what was found, and whether that suffices; nothing of what was not measured."""
    rows: list[Values] = []

    def add(what: str, found: Any, wanted: str, met: bool) -> None:
        rows.append({"to be shown": what, "found": found, "wanted": wanted, "met": "yes" if met else "NO"})

    outcomes = parts.get("tests", {}).get("outcomes", {})
    bad = outcomes.get("failed", 0) + outcomes.get("error", 0)
    if outcomes:
        finished = parts["tests"]["status"] == "done"
        add("tests on the GPU", outcomes, "all pass", finished and not bad and outcomes.get("passed", 0) > 0)
    timed = [row for row in parts.get("speed", {}).get("cases", []) if "ratio" in row and not row.get("compiled")]
    for kind in ("train", "infer"):
        for network in dict.fromkeys(row["network"] for row in timed):
            same = [row for row in timed if (row["network"], row["kind"]) == (network, kind)]
            for precision in dict.fromkeys(row["precision"] for row in same):
                rates = [row for row in same if row["precision"] == precision]
                best = max(row["images_per_s"] for row in rates)
                ratio = best / max(row["torchvision_images_per_s"] for row in rates)
                what = f"{network} {kind} {precision}, best batch, against torchvision's best"
                add(what, round(ratio, 2), f">= {FASTER}", ratio >= FASTER)
    if timed:
        least = min(timed, key=lambda row: float(row["ratio"]))
        add("the least ratio of all", f"{least['ratio']:.2f} ({least['name']})", ">= 1", least["ratio"] >= 1)
    trained = parts.get("training", {})
    if "val/AP50" in trained and trained.get("data") != "MiniVOC":
        add(
            "AP50 on the VOC2012 subset",
            trained["val/AP50"],
            f">= {AP50_ON_A_CPU}",
            trained["val/AP50"] >= AP50_ON_A_CPU,
        )
    if "data_wait_share" in trained:
        share = trained["data_wait_share"]
        add("waiting for data, of a training step", round(share, 3), f"< {MOST_WAIT}", share < MOST_WAIT)
    return rows


def run_parts(record: Record, check: Check, chosen: Sequence[Part], seconds: float) -> None:
    """Run the parts one after the other while time is left, and write the record before and after each."""
    end = monotonic() + seconds
    for part in chosen:
        began, left = monotonic(), end - monotonic()
        allowed = min(part.share * seconds, left)
        if allowed < part.least and not check.quick:
            why = f"{left:.0f} s were left, and it needs {part.least:.0f}"
            record.update(part.name, status="left out", why=why)
            continue
        print(f"{part.name}: at most {allowed:.0f} s", file=sys.stderr, flush=True)
        record.update(part.name, status="running")
        try:
            found = part.task(check, allowed)
        except Exception as error:  # of this part alone
            found = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
        record.document = Record(record.folder).document  # the timings write into it as well
        record.document["verdicts"] = verdicts(record.document["parts"] | {part.name: record.part(part.name) | found})
        record.update(part.name, **{"status": "done"} | found, seconds=round(monotonic() - began, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the detector on this machine's GPU, and write gpu_check.json and .md; return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark.gpu_check", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder of the results; it must be new")
    parser.add_argument("--minutes", type=float, default=10, help="of everything together; default 10")
    parser.add_argument("--data", help="folder or tar file with VOC2012's subset; by default FRCNN_SHARED_DATA")
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="only these", metavar="PART")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if (output / JSON).exists():
        parser.error(f"--output {options.output}: holds a check already; name another folder")
    output.mkdir(parents=True, exist_ok=True)
    record = Record(output)
    record.document |= {"started": f"{datetime.now():%Y-%m-%d %H:%M}", "minutes": options.minutes, "verdicts": []}
    record.document["command"] = " ".join(["python -m experiments.benchmark.gpu_check", *(arguments or sys.argv[1:])])
    chosen = [part for part in PARTS if part.name in options.parts]
    began = monotonic()
    with contextlib.ExitStack() as stack:  # at SIGTERM, too, everything that was started is ended
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        stop_if_asked = stack.enter_context(stopped_by_sigterm())
        data = tasks.find_data(options.data)
        check = Check(output, folder, data, options.accelerator, options.quick, stop_if_asked)
        if {"training", "grid"} & set(options.parts):
            check.writers.append(stack.enter_context(tasks.written_data(check)))
        run_parts(record, check, chosen, 60 * options.minutes)
    record.document["took"] = f"{monotonic() - began:.0f} s"
    record.write()
    for part in record.document["parts"].items():
        print(f"{part[0]}: {part[1].get('status', '')} {part[1].get('why', '')}")
    print(f"results: {output / MARKDOWN}")
    bad = [part for part in record.document["parts"].values() if part.get("status") in ("failed", "cut off")]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
