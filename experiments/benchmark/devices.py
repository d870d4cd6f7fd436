"""`frcnn benchmark train --devices`: weak scaling of our training step under DistributedDataParallel.

Each device is a process of its own with as many images as one device alone has: a GPU, or on the CPU a process with one
thread. All start each step together, and a step takes as long as the slowest needs.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import median
from typing import Final

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.measuring import milliseconds, processor
from experiments.benchmark.models import OBJECTS, Network, build_network, make_images
from experiments.benchmark.network import case_name
from experiments.benchmark.processes import run_processes
from experiments.benchmark.programs import PACKAGES, Setting, our_optimizer, program, ready

WARM_UP: Final = 2


class Loss(nn.Module):
    """The detector's loss as the forward pass that DistributedDataParallel wraps."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """Return the weighted sum of the four losses."""
        return self.model.losses(images, targets)["loss"]


def benchmark_devices(networks: Sequence[Network], devices: Sequence[int], setting: Setting) -> Benchmark:
    """Time training steps of our detector on one device, to compare with, and on these numbers of them.

    Raises:
        InputError: A number below 1, or more GPUs than there are.
        ProcessFailed: A process failed or took longer than the time limit.
    """
    cuda, cores = setting.device.type == "cuda", os.cpu_count() or 1
    listed = ",".join(map(str, devices))
    if min(devices) < 1:
        raise InputError(f"--devices {listed}: must be at least 1")
    if cuda and max(devices) > torch.cuda.device_count():
        raise InputError(f"--devices {listed}: there are {torch.cuda.device_count()} GPUs")
    where = f"cuda: {torch.cuda.get_device_name()}" if cuda else f"cpu: {processor()}, one per process"
    title = "one training step in milliseconds under DistributedDataParallel, with the same images on each device"
    benchmark = Benchmark(title, where, PACKAGES, progress=True)
    for network, number, precision in product(networks, setting.batch_sizes, setting.precisions):
        alone = 0.0
        for world in sorted({1, *devices}):
            title = f"{case_name(network, precision, number)} per device, {world} device{'s' * (world > 1)}"
            with tempfile.TemporaryDirectory() as folder:
                store = str(Path(folder) / "store")
                arguments = [(rank, world, store, network, number, precision, setting) for rank in range(world)]
                times = run_processes(time_steps, arguments, setting.time_limit)
            spent = median(max(step) for step in zip(*times, strict=True))
            case = Case(title, spent, number=number * world, value=world)
            alone = alone or case.ours_per_s
            efficiency = case.ours_per_s / (world * alone)
            benchmark.add(replace(case, efficiency=efficiency))
            if world > 1:
                benchmark.notes.append(
                    f"{title}: {case.ours_per_s / alone:.2f} times the images per second of one ({alone:.3g} to "
                    f"{case.ours_per_s:.3g}), efficiency {efficiency:.2f}"
                )
    if not cuda and max(devices) > cores:
        benchmark.notes.append(f"{max(devices)} processes share {cores} cores")
    return benchmark


def time_steps(
    rank: int, world: int, store: str, network: Network, number: int, precision: str, setting: Setting
) -> list[float]:
    """Return the milliseconds of each step of this process, one of `world` that meet through the file `store`."""
    cuda = setting.device.type == "cuda"
    device = torch.device("cuda", rank) if cuda else setting.device
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    limit = timedelta(seconds=setting.time_limit)
    distributed.init_process_group("nccl" if cuda else "gloo", f"file://{store}", limit, world, rank)
    images, targets = make_images(network.size, number, OBJECTS, device)
    model = ready(build_network(network, (images, targets))[0], replace(setting, device=device))
    wrapped = DistributedDataParallel(Loss(model), device_ids=[rank] if cuda else None)
    step = program(lambda: wrapped(images, targets), our_optimizer(model), precision, device)
    torch.manual_seed(rank)
    times = []
    for _ in range(WARM_UP + setting.repeats):
        distributed.barrier()
        times.append(milliseconds(step, device))
    distributed.destroy_process_group()
    return times[WARM_UP:]
