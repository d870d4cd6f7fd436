"""Peak memory of a step, of our detector and of torchvision's.

On the CPU each is measured in a process of its own, where nothing else was allocated: the peak of its resident memory
during a second step, when gradients and the optimiser's state exist, beyond what it held before the network was built.
On a GPU it is the same of what PyTorch's allocator handed out, in this process.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from experiments.benchmark.cases import Case
from experiments.benchmark.measuring import CPU, peak_memory, used_memory
from experiments.benchmark.models import OBJECTS, Batch, NetworkOptions, build_network, make_images
from experiments.benchmark.processes import run_processes
from experiments.benchmark.programs import Setting, our_program, peer_program, ready
from experiments.benchmark.torchvision_peer import build_peer, peer_batch

SLOPE: Final = (1, 2)
"""Numbers of images of the two steps whose difference is what a further image takes."""


@dataclass
class StepMemory:
    """Peaks of the steps of one network, each measured once; None where the system does not tell."""

    options: NetworkOptions
    setting: Setting
    known: dict[tuple[int, str, bool], float | None] = field(default_factory=dict)

    def peak(self, number: int, precision: str, peer: bool) -> float | None:
        """Return the MB of one step on `number` images beyond the images."""
        key = number, precision, peer
        if key not in self.known:
            arguments = (self.options, *key, self.setting, torch.get_num_threads())
            if self.setting.device.type == "cuda":
                self.known[key] = peak_of_a_step(*arguments)
                torch.cuda.empty_cache()
            else:
                (self.known[key],) = run_processes(peak_of_a_step, [arguments], self.setting.time_limit)
        return self.known[key]

    def per_image(self, precision: str, peer: bool) -> float | None:
        """Return the MB that each further image takes; None where that is too little to be told from the rest."""
        few, many = (self.peak(number, precision, peer) for number in SLOPE)
        if few is None or many is None or many <= few:
            return None
        return (many - few) / (SLOPE[1] - SLOPE[0])

    def measure(self, number: int, peer: bool) -> None:
        """Measure all that cases need, before anything else takes memory."""
        for size in dict.fromkeys((number, *SLOPE)):
            for precision in self.setting.precisions:
                for of_peer in (False, True)[: 1 + peer]:
                    self.peak(size, precision, of_peer)

    def added(self, case: Case, number: int, precision: str, peer_precision: str | None) -> Case:
        """Return the case with the memory of both, the peer's in a precision of its own."""
        if peer_precision is not None:
            theirs = self.peak(number, peer_precision, True), self.per_image(peer_precision, True)
            case = replace(case, peer_peak_mb=theirs[0], peer_mb_per_image=theirs[1])
        ours = self.peak(number, precision, False), self.per_image(precision, False)
        return replace(case, ours_peak_mb=ours[0], mb_per_image=ours[1])


def peak_of_a_step(
    options: NetworkOptions, number: int, precision: str, peer: bool, setting: Setting, threads: int
) -> float | None:
    """Return the MB of the second step or inference on `number` images, with the network, beyond the images.

    On the CPU it must run in a process of its own.
    """
    torch.set_num_threads(threads)
    batch = make_images(options.size, number, OBJECTS, setting.device)
    batch = peer_batch(batch) if peer else batch
    before = used_memory(setting.device)
    run = _program(options, batch, precision, peer, setting)
    run()
    peak = peak_memory(run, setting.device)
    return None if peak is None or before is None else peak - before


def _program(
    options: NetworkOptions, batch: Batch, precision: str, peer: bool, setting: Setting
) -> Callable[[], object]:
    """Return a step of one of the two networks; of the other nothing is left."""
    model, backbone = build_network(options, make_images(options.size, 1, OBJECTS, CPU))
    if peer:
        run = peer_program(build_peer(model, backbone), batch, precision, setting)
    else:
        run = our_program(ready(model, setting), batch, precision, setting)
    del model
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would count as the step's
    return run
