"""`torch.compile` of the parts of a detector that are plain tensor functions: backbone, RPN head and box head.

What depends on the data (proposals, sampling, NMS) is not compiled: its shapes differ in every image.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from detector.backbones.base import Backbone
from detector.backbones.box_heads import BoxHead
from detector.errors import InputError
from detector.rpn import RegionProposalNetwork

CompileMode = Literal["none", "default", "max-autotune"]
_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True},  # without CUDA graphs: sizes vary
}
_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}
"""Of the processors for which inductor writes C++ code that is wrong on the others. Its cache of such code, which
machines may share, does not look at the processor, but at the options."""
_GRAPHS = 64
"""Limit of graphs of one function, above torch's 8: there is one for training and one for evaluation, of batches of one
image and of more, on CPUs of small maps, and in alternating training of each step."""


def compilable(module: nn.Module) -> list[nn.Module]:
    """Return the backbones, RPN heads and box heads of a module, those of one's own too."""
    heads = [part.head for part in module.modules() if isinstance(part, RegionProposalNetwork)]
    return [*heads, *(part for part in module.modules() if isinstance(part, Backbone | BoxHead))]


def compile_networks(networks: Iterable[nn.Module], mode: CompileMode, device: torch.device) -> None:
    """Compile networks in place, once; names of tensors stay, and copies of the networks are not compiled.

    Heights, widths and numbers of RoIs are variables of one graph. Dropout draws the numbers that it draws uncompiled.

    Raises:
        InputError: There is no working compiler for the device, or no such mode.
    """
    if mode == "none":
        return
    check_compile_mode(mode)
    check_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    options = {"fallback_random": True, "cpp.simdlen": _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())}
    for network in networks:
        if network._compiled_call_impl is None:
            network.compile(dynamic=True, options=options | _OPTIONS[mode])


def check_compile_mode(mode: str) -> None:
    """Raise InputError for a mode that there is not."""
    if mode not in ("none", *_OPTIONS):
        raise InputError(f"compile {mode}: choose none, {' or '.join(_OPTIONS)}")


def check_deterministic(pooling: str, device: torch.device) -> None:
    """Refuse what would end a training under PyTorch's deterministic algorithms in the middle of its first step.

    On CUDA the gradients of RoIPool and of adaptive max pooling have no deterministic algorithm. That of RoIAlign is
    torchvision's program in PyTorch, which it compiles.

    Raises:
        InputError: There is no such algorithm for `roi.pooling`, or no working compiler.
    """
    enabled = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if not enabled or device.type != "cuda":
        return
    if pooling in ("roi_pool", "roi_pool_floor"):
        raise InputError(
            f"trainer.deterministic true: roi.pooling {pooling} has no deterministic gradient on CUDA; take roi_align "
            "or roi_align_legacy, or give trainer.deterministic warn"
        )
    check_compiler(device, f"trainer.deterministic true, roi.pooling {pooling}", "trainer.deterministic warn")


@cache
def check_compiler(device: torch.device, asked: str = "compile", instead: str = "compile none") -> None:
    """Try to compile a trivial function for the device; takes seconds, once.

    Args:
        device: The process's own: on another GPU a context would stay behind, which takes memory.
        asked: What it is for, for the message.
        instead: What works without a compiler.

    Raises:
        InputError: It does not work.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            torch.compile(_trivial, dynamic=True)(torch.ones(2, 3, device=device))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if not line.startswith("backend=")), type(error).__name__)
        needed = "a C++ compiler (such as g++, or one named by CXX)" if device.type == "cpu" else "Triton and gcc"
        raise InputError(
            f"{asked}: nothing can be compiled for the {device.type} here ({reason}); install {needed}, or give "
            f"{instead}"
        ) from error


def _trivial(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).relu()
