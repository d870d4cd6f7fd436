"""The part of a check that times: our detector beside torchvision's, NMS and RoIAlign alone, and one step's trace.

A program of its own, so that whatever a GPU's error leaves of a process ends with it. It goes down one list, the most
important first, until its time is up; started again it goes on where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torchvision import ops

from detector.faster_rcnn import FasterRCNN
from experiments.benchmark.gpu_check.record import Record, Values
from experiments.benchmark.measuring import (
    CPU,
    Run,
    device_name,
    median_parts_in_turn,
    median_times,
    milliseconds,
    peak_memory,
    processor,
    used_memory,
)
from experiments.benchmark.models import OBJECTS, build_network, make_images, standard_network
from experiments.benchmark.network import our_case
from experiments.benchmark.programs import Setting, our_program, peer_program, ready
from experiments.benchmark.step_parts import parts_program
from experiments.benchmark.torchvision_peer import build_peer, peer_batch

NETWORKS: Final = {
    "vgg16": (600, 1000),
    "resnet50_fpn": (800, 1333),
    "resnet50_c4": (600, 1000),
    "mobilenet_v3_large_320_fpn": (320, 427),
}
QUICK: Final = {"mobilenet_v3_large_320_fpn": (64, 96)}
SECONDS: Final = 1.0
"""Of the timed rounds of a case."""
TRACE: Final = "trace.json.gz"
LARGEST: Final = 16 * 2**20
Kind = Literal["train", "infer"]


@dataclass(frozen=True)
class Case:
    """A step or inference to be timed."""

    network: str
    kind: Kind
    images: int
    precision: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """Return it in words."""
        compiled = ", compiled" if self.compiled else ""
        return f"{self.network} {self.kind}, batch {self.images}, {self.precision}{compiled}"


def cases(quick: bool) -> tuple[list[Case], list[Case]]:
    """Return the cases that come first, and those for the time that is left."""
    if quick:
        (network,) = QUICK
        return [Case(network, kind, 1, "32-true") for kind in _kinds()], [Case(network, "infer", 2, "tf32")]
    main = [Case(*case, "bf16-mixed") for case in _cases((1, 8, 16, 2))]
    rest = [Case(*case, "tf32") for case in _cases((8, 1))]
    rest += [Case(name, kind, 8, "bf16-mixed", True) for name in list(NETWORKS)[::-1] for kind in _kinds()]
    return main, rest + [Case(*case, "tf32") for case in _cases((16, 2))]


def _kinds() -> tuple[Kind, Kind]:
    return "train", "infer"


def _cases(batches: tuple[int, ...]) -> Iterator[tuple[str, Kind, int]]:
    return ((name, kind, number) for number, name, kind in product(batches, NETWORKS, _kinds()))


@dataclass
class Bench:
    """The device, and the pairs of detectors that were built so far."""

    device: torch.device
    sizes: dict[str, tuple[int, int]]
    quick: bool
    pairs: dict[str, tuple[FasterRCNN, nn.Module]] = field(default_factory=dict)

    def pair(self, name: str) -> tuple[FasterRCNN, nn.Module]:
        """Return our detector and torchvision's with the same weights, on the device."""
        if name not in self.pairs:
            network = standard_network(name, self.sizes[name])
            model, backbone = build_network(network, make_images(network.size, 1, OBJECTS, CPU))
            peer = build_peer(model, backbone)
            self.pairs[name] = model.to(self.device), peer.to(self.device)
        return self.pairs[name]

    def measure(self, case: Case) -> Values:
        """Time a case of ours beside torchvision's, in turn; then its parts, and its memory at the peak."""
        model, peer = self.pair(case.network)
        batch = make_images(self.sizes[case.network], case.images, OBJECTS, self.device)
        setting = Setting(case.kind, (case.images,), (case.precision,), compile=case.compiled, device=self.device)
        try:
            ours = our_program(ready(model, setting), batch, case.precision, setting)
            theirs = peer_program(peer, peer_batch(batch), case.precision, setting)
            few = {"repeats": 1, "seconds": 0.0} if self.quick else {"repeats": 5, "seconds": SECONDS}
            time, peer_time = median_times([ours, theirs], self.device, **few)  # type: ignore[arg-type]
            run_parts = parts_program(model, batch, case.precision, setting)
            (parts,) = median_parts_in_turn([run_parts], 1 if self.quick else 3)
            found = our_case(case.name, time, case.images, parts)
            peaks = [self.peak(run, network, case) for run, network in ((ours, model), (theirs, peer))]
        finally:
            for network in (model, peer):
                network.zero_grad()
            for part in (model.backbone, model.rpn.head, model.roi_heads.box_head):
                part._compiled_call_impl = None
        return {
            **{name: getattr(case, name) for name in ("network", "kind", "images", "precision")},
            "compiled": "yes" if case.compiled else "",
            "ours_ms": time,
            "torchvision_ms": peer_time,
            "ratio": peer_time / time,
            "images_per_s": found.ours_per_s,
            "torchvision_images_per_s": 1000 * case.images / peer_time,
            "peak_mib": peaks[0],
            "torchvision_peak_mib": peaks[1],
            "times_bare_network": found.times_the_limit,
            "parts_ms": parts,
        }

    def peak(self, run: Run, network: nn.Module, case: Case) -> float | None:
        """Return the MiB of a step at its peak: the network's own, and what the step needs beside it."""
        before, most = used_memory(self.device), peak_memory(run, self.device)
        if before is None or most is None:
            return None
        tensors = [*network.parameters(), *network.buffers()]
        trained = [tensor for tensor in network.parameters() if tensor.requires_grad and case.kind == "train"]
        own = sum(tensor.nbytes for tensor in [*tensors, *trained, *trained])  # gradients and momentum
        return most - before + own / 2**20


def operations(bench: Bench) -> list[Values]:
    """Return the milliseconds of NMS and RoIAlign alone, at the sizes that detectors have."""
    device, rows = bench.device, []
    few = bench.quick
    rng = torch.Generator().manual_seed(0)

    def boxes(number: int) -> Tensor:
        corners = torch.rand(number, 2, generator=rng) * torch.tensor([1000.0, 600.0])
        return torch.cat((corners, corners + 16 + 300 * torch.rand(number, 2, generator=rng) ** 2), 1).to(device)

    def add(name: str, *runs: tuple[str, Run]) -> None:
        times = median_times([run for _, run in runs], device, 1 if few else 20, 0.0 if few else 0.3)
        rows.append({"operation": name} | {f"{who}_ms": time for (who, _), time in zip(runs, times, strict=True)})

    for number in (100,) if few else (1000, 2000, 6000, 12000):
        one, scores = boxes(number), torch.rand(number, generator=rng).to(device)
        add(f"NMS of {number} boxes", ("torchvision", partial(ops.nms, one, scores, 0.7)))
        eight = torch.cat([one] * 8), torch.cat([scores] * 8), torch.arange(8, device=device).repeat_interleave(number)
        add(
            f"NMS of 8 images of {number} boxes",
            ("one_by_one", partial(_eight_times, partial(ops.nms, one, scores, 0.7))),
            ("batched", partial(ops.batched_nms, *eight, 0.7)),
        )
    name = next(iter(bench.sizes)) if few else "resnet50_fpn"
    model, peer = bench.pair(name)
    height, width = bench.sizes[name]
    levels = len(model.backbone.roi_strides)
    maps = [(height // stride, width // stride) for stride in model.backbone.roi_strides]
    features = [torch.rand(2, 256, *size, generator=rng).to(device).requires_grad_() for size in maps]
    rois = [boxes(512).clamp(max=float(min(height, width))) for _ in range(2)]
    named, sizes = dict(zip(map(str, range(levels)), features, strict=True)), [(height, width)] * 2

    def ours() -> Tensor:
        return model.roi_heads.pool(features, rois)

    def theirs() -> Tensor:
        pooled: Tensor = peer.roi_heads.box_roi_pool(named, rois, sizes)  # type: ignore[union-attr, operator]
        return pooled

    for title, wrap in (("forward", lambda run: run), ("forward and backward", _with_backward)):
        add(f"RoIAlign of 2 x 512 RoIs, {levels} levels, {title}", ("ours", wrap(ours)), ("torchvision", wrap(theirs)))
    return rows


def _eight_times(run: Run) -> None:
    for _ in range(8):
        run()


def _with_backward(run: Callable[[], Tensor]) -> Run:
    return lambda: run().sum().backward()


def trace(bench: Bench, folder: Path) -> Values:
    """Write a training step's trace for Perfetto; return its operators by their own time on host and device."""
    name = next(iter(bench.sizes)) if bench.quick else "resnet50_fpn"
    precision, images = ("32-true", 1) if bench.quick else ("bf16-mixed", 2)
    setting = Setting("train", device=bench.device)
    batch = make_images(bench.sizes[name], images, OBJECTS, bench.device)
    step = our_program(ready(bench.pair(name)[0], setting), batch, precision, setting)
    (time,) = median_times([step], bench.device, 1 if bench.quick else 5, 0.5)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    profile.export_chrome_trace(str(folder / TRACE))
    size = (folder / TRACE).stat().st_size
    if size > LARGEST:
        (folder / TRACE).unlink()
    events = profile.key_averages()
    rows = [
        {
            "operator": event.key,
            "calls": event.count,
            "host_ms": event.self_cpu_time_total / 1000,
            "device_ms": event.self_device_time_total / 1000,
        }
        for event in events
    ]
    waits = {row["operator"]: row["calls"] for row in rows if "ynchronize" in row["operator"]}
    waits |= {row["operator"]: row["calls"] for row in rows if row["operator"] in ("cudaLaunchKernel", "aten::item")}

    def most(key: str) -> list[Values]:
        return [row for row in sorted(rows, key=lambda row: -row[key])[:20] if row[key]]

    return {
        "step": f"{name} train, batch {images}, {precision}",
        "step_ms": time,
        "trace": f"{TRACE}, {size / 2**20:.1f} MiB" if size <= LARGEST else f"left out: {size / 2**20:.1f} MiB",
        "calls": waits,
        "by host": most("host_ms"),
        "by device": most("device_ms"),
    }


def new_sizes(bench: Bench) -> list[Values]:
    """Return the milliseconds of the first and of the second training step on images of sizes that were not seen yet.

    cuDNN plans each convolution of a new size, in both passes: images of many sizes cost a training these times. From
    9.10 on it is said to compile depthwise convolutions then (NVIDIA/cudnn-frontend, issue 1066), so a network without
    any is timed, too, and the one that has them once more with PyTorch's own kernels instead of cuDNN's.
    """
    *_, depthwise = bench.sizes
    dense = "resnet50_fpn" if not bench.quick else depthwise
    widths, others = ((128,), (160,)) if bench.quick else ((352, 384, 416), (448, 480))
    rows = [_at_new_size(bench, name, width) for name in dict.fromkeys((depthwise, dense)) for width in widths]
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        return rows + [_at_new_size(bench, depthwise, width) | {"cudnn": "no"} for width in others]
    finally:
        torch.backends.cudnn.enabled = enabled


def _at_new_size(bench: Bench, name: str, width: int) -> Values:
    precision = "32-true" if bench.device.type == "cpu" else "bf16-mixed"
    setting = Setting("train", device=bench.device)
    ours, theirs = bench.pair(name)
    batch = make_images((width - 32, width), 2, OBJECTS, bench.device)
    row: Values = {"size": f"{name} train, batch 2, {precision}, {width - 32}x{width}"}
    for who, network, make, images in (
        ("ours", ours, our_program, batch),
        ("torchvision", theirs, peer_program, peer_batch(batch)),
    ):
        step = make(network.train(), images, precision, setting)  # type: ignore[arg-type]
        row |= {f"{who}_{nth}_ms": milliseconds(step, bench.device) for nth in ("first", "second")}
    return row


def work(record: Record, bench: Bench, until: float, rest: bool) -> None:
    """Do what is still to be done of the list, one after the other, until the time is up; errors are kept."""
    first, later = cases(bench.quick)
    many = 2 if bench.quick else 16
    tasks: list[tuple[str, Callable[[], Values]]] = [
        (case.name, partial(bench.measure, case)) for case in first + (later if rest else [])
    ]
    others: list[tuple[str, Callable[[], Values]]] = [
        ("trace", lambda: trace(bench, record.folder)),
        ("operations", lambda: {"rows": operations(bench)}),
        ("new sizes", lambda: {"rows": new_sizes(bench)}),
    ]
    longest = 0.0
    for name, task in tasks[:many] + others + tasks[many:]:
        part = record.part("speed")
        rows: list[Values] = part.get("cases", [])
        if name in part or any(row["name"] == name and "error" not in row for row in rows):
            continue
        began = monotonic()
        if began + longest > until:
            break
        print(name, file=sys.stderr, flush=True)
        try:
            found = task()
        except Exception as error:  # whatever it is, the next case may work
            found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
            torch.cuda.empty_cache()
        found["took_s"] = monotonic() - began
        longest = max(longest, 0.7 * found["took_s"])
        if name in ("operations", "new sizes"):
            record.update("speed", **{name: found.get("rows") or found})
        elif name == "trace":
            record.update("trace", status="failed" if "error" in found else "done", **found)
            record.update("speed", trace=found.get("trace", "failed"))
        else:
            rows = [row for row in rows if row["name"] != name]
            record.update("speed", cases=[*rows, {"name": name, **found}])


def main() -> int:
    """Time what fits into the given seconds, and add it to the record in a folder."""
    parser = argparse.ArgumentParser(prog="speed", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--accelerator", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rest", action="store_true")
    options = parser.parse_args()
    until = monotonic() + options.seconds
    record = Record(options.output)
    device = CPU if options.accelerator == "cpu" else torch.device("cuda")
    names: Values = {"device": device_name(device), "processor": processor()}
    if device.type == "cuda":
        names |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        names["capability"] = json.dumps(torch.cuda.get_device_capability())
    record.update("speed", **names)
    work(record, Bench(device, QUICK if options.quick else NETWORKS, options.quick), until, options.rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
