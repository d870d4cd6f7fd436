"""`torch.compile` of the parts of a detector that are plain tensor functions: backbone, RPN head and box head.

What depends on the data (proposals, sampling, NMS) is not compiled: its shapes differ in every image.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from detector.errors import InputError

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


def compile_networks(networks: Iterable[nn.Module], mode: CompileMode, device: torch.device) -> None:
    """Compile networks in place, once; names of tensors stay, and copies of the networks are not compiled.

    Heights, widths and numbers of RoIs are variables of one graph. Dropout draws the numbers that it draws uncompiled.

    Raises:
        InputError: There is no working compiler for the device, or no such mode.
    """
    if mode == "none":
        return
    check_compile_mode(mode)
    check_compiler(device.type)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    options = {"fallback_random": True, "cpp.simdlen": _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())}
    for network in networks:
        if network._compiled_call_impl is None:
            network.compile(dynamic=True, options=options | _OPTIONS[mode])


def check_compile_mode(mode: str) -> None:
    """Raise InputError for a mode that there is not."""
    if mode not in ("none", *_OPTIONS):
        raise InputError(f"compile {mode}: choose none, {' or '.join(_OPTIONS)}")


@cache
def check_compiler(device_type: str) -> None:
    """Raise InputError unless a trivial function can be compiled for the device; takes seconds, once."""
    try:
        torch.compile(_trivial, dynamic=True)(torch.ones(2, 3, device=device_type))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if not line.startswith("backend=")), type(error).__name__)
        needed = "a C++ compiler (such as g++, or one named by CXX)" if device_type == "cpu" else "Triton and gcc"
        raise InputError(
            f"compile: nothing can be compiled for the {device_type} here ({reason}); install {needed}, or give "
            "compile none"
        ) from error


def _trivial(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).relu()
