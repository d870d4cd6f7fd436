"""`frcnn benchmark train --devices`: weak scaling of our training step under DistributedDataParallel.

Each device is a process of its own with as many images as one device alone has: a GPU, or on the CPU a process with one
thread. All start each step together, and a step takes as long as the slowest needs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from experiments.benchmark.cases import Benchmark, Case, processor
from experiments.benchmark.models import OBJECTS, NetworkOptions, build_network, make_images
from experiments.benchmark.network import case_name
from experiments.benchmark.processes import run_processes
from experiments.benchmark.programs import Setting, autocast, check_numbers, our_optimizer, ready, this_device
from experiments.benchmark.step_parts import synchronize

WARM_UP: Final = 2


class Loss(nn.Module):
    """The detector's loss as the forward pass that DistributedDataParallel wraps."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """The weighted sum of the four losses."""
        return self.model.losses(images, targets)["loss"]


def benchmark_devices(
    networks: Sequence[tuple[str, NetworkOptions]],
    devices: Sequence[int],
    batch_sizes: Sequence[int] = (1,),
    precisions: Sequence[str] = ("32-true",),
    repeats: int = 5,
    compile: bool = False,
    time_limit: float = 900,
    report: Callable[[Case], object] = lambda case: None,
) -> Benchmark:
    """Time training steps of our detector on one device and on several.

    Args:
        networks: Name and options of each.
        devices: Numbers of devices; one is always measured, to compare with.
        batch_sizes: Images per device.
        precisions: As Lightning names them.
        repeats: Timed steps; their median counts.
        compile: Whether the network is compiled.
        time_limit: Seconds for the processes of one case.
        report: Is told of each case as soon as it is measured.

    Raises:
        InputError: A number out of range, an unknown precision, or more GPUs than there are.
        ProcessFailed: A process failed or took longer than `time_limit`.
    """
    check_numbers(batch_sizes, precisions, repeats)
    device = this_device()
    if min(devices) < 1:
        raise InputError(f"--devices {_listed(devices)}: must be at least 1")
    if device.type == "cuda" and max(devices) > torch.cuda.device_count():
        raise InputError(f"--devices {_listed(devices)}: there are {torch.cuda.device_count()} GPUs")
    setting = Setting("train", device, repeats, compile)
    cases, notes = [], []
    for name, options in networks:
        for number in batch_sizes:
            for precision in precisions:
                alone: Case | None = None
                for world in sorted({1, *devices}):
                    spent = _milliseconds(options, number, precision, world, setting, time_limit)
                    case = _case(case_name(name, options, number, precision), spent, number, world, alone)
                    alone = alone or case
                    cases.append(case)
                    report(case)
                    if world > 1:
                        notes.append(_words(case, alone))
    cores = os.cpu_count() or 1
    if device.type == "cpu" and max(devices) > cores:
        notes.append(f"{max(devices)} processes share {cores} cores")
    where = f"cuda: {torch.cuda.get_device_name()}" if device.type == "cuda" else f"cpu: {processor()}, one per process"
    title = "one training step in milliseconds under DistributedDataParallel, with the same images on each device"
    return Benchmark(title, where, cases, ("torch", "torchvision", "numpy"), notes)


def _listed(devices: Sequence[int]) -> str:
    return ",".join(map(str, devices))


def _case(name: str, milliseconds: float, number: int, world: int, alone: Case | None) -> Case:
    rate = 1000 * number * world / milliseconds
    title = f"{name} per device, {world} device{'s' if world > 1 else ''}"
    case = Case(title, milliseconds, None, ours_per_s=rate, value=world)
    one = rate if alone is None or alone.ours_per_s is None else alone.ours_per_s
    return replace(case, efficiency=rate / (world * one))


def _words(case: Case, alone: Case) -> str:
    assert case.ours_per_s and alone.ours_per_s and case.efficiency
    return (
        f"{case.name}: {case.ours_per_s / alone.ours_per_s:.2f} times the images per second of one "
        f"({alone.ours_per_s:.3g} to {case.ours_per_s:.3g}), efficiency {case.efficiency:.2f}"
    )


def _milliseconds(
    options: NetworkOptions, number: int, precision: str, world: int, setting: Setting, seconds: float
) -> float:
    """Median time of a step of `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        arguments = [(rank, world, store, options, number, precision, setting, seconds) for rank in range(world)]
        times = run_processes(time_steps, arguments, seconds)
    typical: float = median(max(step) for step in zip(*times, strict=True))
    return typical


def time_steps(
    rank: int,
    world: int,
    store: str,
    options: NetworkOptions,
    number: int,
    precision: str,
    setting: Setting,
    seconds: float,
) -> list[float]:
    """Milliseconds of each step of this process, one of `world` that meet through the file `store`."""
    cuda = setting.device.type == "cuda"
    device = torch.device("cuda", rank) if cuda else setting.device
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    distributed.init_process_group(
        "nccl" if cuda else "gloo", f"file://{store}", timedelta(seconds=seconds), world, rank
    )
    images, targets = make_images(options.size, number, OBJECTS, device)
    model = ready(build_network(options, (images, targets))[0], replace(setting, device=device))
    wrapped = DistributedDataParallel(Loss(model), device_ids=[rank] if cuda else None)
    optimizer = our_optimizer(model)
    torch.manual_seed(rank)
    times = []
    for _ in range(WARM_UP + setting.repeats):
        distributed.barrier()
        synchronize(device)
        start = perf_counter()
        with autocast(precision, device):
            loss = wrapped(images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronize(device)
        times.append(1000 * (perf_counter() - start))
    distributed.destroy_process_group()
    return times[WARM_UP:]
