"""Which of the CPU's special functions layers take: what this processor computes well, chosen here and nowhere else.

- `onednn`: fully connected layers in float32 by oneDNN's own functions; where no gradient is needed, large 3 x 3
  convolutions in float32 by Winograd's algorithm, and VGG16's large maps in strips of rows.
- `winograd`: these, and convolutions by Winograd's algorithm in training, too.
- `plain`: PyTorch's functions alone.

What is fast on one processor is slow on the next. Of a channels-last 3 x 3 convolution, 256 to 256 channels, 150 x 200
cells, float32, two cores of an AMD EPYC, torch 2.15: the gradient of the weights takes oneDNN 711 ms with AVX2, where
matrix products by Winograd's algorithm take 100 ms, and 127 ms with AVX-512, where they take 80 ms. The choice depends
on nothing but the processor's instructions and an option, so a resumed run takes the paths that it took before; results
are the same up to rounding on all of them.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from detector.errors import InputError
from detector.kernels.kept import being_compiled
from detector.kernels.processor import instruction_set

CpuKernels = Literal["auto", "winograd", "onednn", "plain"]

_chosen: CpuKernels = "auto"


def cpu_kernels() -> str:
    """Return the name of the functions that are taken now: those chosen, or else those that suit the processor."""
    if _chosen != "auto":
        return _chosen
    return "winograd" if instruction_set() == "avx2" else "onednn"


def use_cpu_kernels(kernels: CpuKernels) -> str:
    """Let the networks of this process take the functions of that name, and return a line that says which and why."""
    global _chosen
    check_cpu_kernels(kernels)
    _chosen = kernels
    if kernels != "auto":
        return f"cpu_kernels {kernels}"
    return f"cpu_kernels auto: {cpu_kernels()}, this processor's instructions are {instruction_set()}"


def check_cpu_kernels(kernels: str) -> None:
    """Raise InputError for functions that there are not."""
    if kernels not in get_args(CpuKernels):
        raise InputError(f"cpu_kernels {kernels}: choose {', '.join(get_args(CpuKernels))}")


def computes_now(x: Tensor) -> bool:
    """Return whether oneDNN may compute a layer of `x`: on a CPU and now, not as a part of a graph that is made."""
    if x.device.type != "cpu" or being_compiled() or x.numel() == 0:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def cpu_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which layers of `x` compute on CPUs, under autocast or without."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
