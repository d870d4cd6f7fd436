"""Peak memory of a step, of our detector and of torchvision's.

On the CPU each is measured in a process of its own, where nothing else was allocated: the peak of its resident memory
during a second step, when gradients and the optimiser's state exist, beyond what it held before the network was built.
On a GPU it is the same of what PyTorch's allocator handed out, in this process.
"""

import contextlib
import ctypes
import gc
from itertools import product
from typing import Final

import torch

from experiments.benchmark.measuring import CPU, peak_memory, used_memory
from experiments.benchmark.models import OBJECTS, Network, build_network, make_images
from experiments.benchmark.processes import run_processes
from experiments.benchmark.programs import Setting, our_program, peer_program, ready
from experiments.benchmark.torchvision_peer import build_peer, peer_batch

SLOPE: Final = (1, 2)
"""Numbers of images of the two steps whose difference is what a further image takes."""


class StepMemory:
    """Peaks of the steps of one network, each measured once; None where the system does not tell."""

    def __init__(self, network: Network, setting: Setting) -> None:
        self.network, self.setting = network, setting
        self.known: dict[tuple[int, str, bool], float | None] = {}

    def peak(self, number: int, precision: str, peer: bool) -> float | None:
        """Return the MB of one step on `number` images beyond the images."""
        key = number, precision, peer
        if key not in self.known:
            arguments = (self.network, *key, self.setting, torch.get_num_threads())
            if self.setting.device.type == "cuda":
                self.known[key] = peak_of_a_step(*arguments)
                torch.cuda.empty_cache()
            else:
                (self.known[key],) = run_processes(peak_of_a_step, [arguments], self.setting.time_limit)
        return self.known[key]

    def figures(self, number: int, precision: str, peer: bool) -> tuple[float | None, float | None]:
        """Return the MB of one step, and what each further image takes, None where that is too little to be told."""
        few, many = (self.peak(size, precision, peer) for size in SLOPE)
        further = None if few is None or many is None or many <= few else (many - few) / (SLOPE[1] - SLOPE[0])
        return self.peak(number, precision, peer), further

    def measure(self, number: int, peer: bool) -> None:
        """Measure all that cases need, before anything else takes memory."""
        for size, precision, of_peer in product((number, *SLOPE), self.setting.precisions, (False, True)[: 1 + peer]):
            self.peak(size, precision, of_peer)


def peak_of_a_step(
    network: Network, number: int, precision: str, peer: bool, setting: Setting, threads: int
) -> float | None:
    """Return the MB of the second step or inference on `number` images, with the network, beyond the images.

    On the CPU it must run in a process of its own.
    """
    torch.set_num_threads(threads)
    batch = make_images(network.size, number, OBJECTS, setting.device)
    batch = peer_batch(batch) if peer else batch
    before = used_memory(setting.device)
    model, backbone = build_network(network, make_images(network.size, 1, OBJECTS, CPU))
    if peer:
        run = peer_program(build_peer(model, backbone), batch, precision, setting)
    else:
        run = our_program(ready(model, setting), batch, precision, setting)
    del model  # of the other network nothing is left
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would count as the step's
    run()
    peak = peak_memory(run, setting.device)
    return None if peak is None or before is None else peak - before
