"""Peak memory of a step, of our detector and of torchvision's.

On the CPU each is measured in a process of its own, where nothing else was allocated: the peak of its resident memory
during a second step, when gradients and the optimiser's state exist, beyond what it held before the network was built.
On a GPU it is the same of what PyTorch's allocator handed out, in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from experiments.benchmark.cases import Case, resident_memory, start_peak
from experiments.benchmark.models import OBJECTS, NetworkOptions, build_network, make_images
from experiments.benchmark.processes import run_processes
from experiments.benchmark.programs import Program, Setting, our_program, peer_images, peer_program, ready
from experiments.benchmark.torchvision_peer import build_peer

SLOPE: Final = (1, 2)
"""Numbers of images of the two steps whose difference is what a further image takes."""


@dataclass
class StepMemory:
    """Peaks of the steps of one network, each measured once; None where the system does not tell."""

    options: NetworkOptions
    setting: Setting
    seconds: float
    known: dict[tuple[int, str, bool], float | None] = field(default_factory=dict)

    def peak(self, number: int, precision: str, peer: bool) -> float | None:
        """MB of one step on `number` images beyond the images."""
        key = number, precision, peer
        if key not in self.known:
            arguments = (self.options, *key, self.setting, torch.get_num_threads())
            if self.setting.device.type == "cuda":
                self.known[key] = peak_of_a_step(*arguments)
                torch.cuda.empty_cache()
            else:
                (self.known[key],) = run_processes(peak_of_a_step, [arguments], self.seconds)
        return self.known[key]

    def per_image(self, precision: str, peer: bool) -> float | None:
        """MB that each further image takes; None where that is too little to be told from the rest."""
        few, many = (self.peak(number, precision, peer) for number in SLOPE)
        if few is None or many is None or many <= few:
            return None
        return (many - few) / (SLOPE[1] - SLOPE[0])

    def measure(self, number: int, precisions: Sequence[str], peer: bool) -> None:
        """All that cases of these precisions need, before anything else takes memory."""
        for size in dict.fromkeys((number, *SLOPE)):
            for precision in precisions:
                for of_peer in (False, True) if peer else (False,):
                    self.peak(size, precision, of_peer)

    def added(self, case: Case, number: int, precision: str, peer_precision: str | None) -> Case:
        """The case with the memory of both, the peer's in a precision of its own."""
        ours, theirs = self.per_image(precision, False), None
        if peer_precision is not None:
            theirs = self.per_image(peer_precision, True)
            case = replace(
                case,
                peer_peak_mb=self.peak(number, peer_precision, True),
                peer_mb_per_image=theirs,
                peer_images_per_gib=_per_gib(theirs),
            )
        return replace(
            case,
            ours_peak_mb=self.peak(number, precision, False),
            mb_per_image=ours,
            images_per_gib=_per_gib(ours),
        )


def _per_gib(megabytes: float | None) -> float | None:
    return None if megabytes is None else 1024 / megabytes


def peak_of_a_step(
    options: NetworkOptions, number: int, precision: str, peer: bool, setting: Setting, threads: int
) -> float | None:
    """MB of the second step or inference on `number` images, with the network, beyond the images.

    On the CPU it must run in a process of its own.
    """
    torch.set_num_threads(threads)
    images, targets = make_images(options.size, number, OBJECTS, setting.device)
    if peer:
        images = peer_images(images)
    before = _used(setting.device)
    program = _program(options, (images, targets), precision, peer, setting)
    program.run()
    _start_peak(setting.device)
    program.run()
    peak = _peak(setting.device)
    return None if peak is None or before is None else peak - before


def _program(
    options: NetworkOptions,
    batch: tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]],
    precision: str,
    peer: bool,
    setting: Setting,
) -> Program:
    """A step of one of the two networks; of the other nothing is left."""
    small = make_images(options.size, 1, OBJECTS, torch.device("cpu"))
    model, backbone = build_network(options, small)
    if not peer:
        program = our_program(ready(model, setting), batch, precision, setting)
    else:
        other = build_peer(model, backbone).to(setting.device).train(setting.kind == "train")
        program = peer_program(other, batch, precision, setting)
    del model
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would count as the step's
    return program


def _used(device: torch.device) -> float | None:
    if device.type == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated(device) / 2**20
    return resident_memory("VmRSS")


def _start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        start_peak()


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_memory("VmHWM")
