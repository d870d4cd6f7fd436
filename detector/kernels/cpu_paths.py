"""Which of the CPU's special paths layers take: what this processor computes well, chosen here and nowhere else.

What is fast on one processor is slow on the next. Of a channels-last 3 x 3 convolution, 256 to 256 channels, 150 x 200
cells, float32, two cores of an AMD EPYC, torch 2.15: the gradient of the weights takes oneDNN 711 ms with AVX2, where
matrix products by Winograd's algorithm take 100 ms, and 127 ms with AVX-512, where they take 80 ms. The choice depends
on nothing but the processor's instructions and an option, so a resumed run takes the paths that it took before; results
are the same up to rounding on all of them.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from torch import Tensor

from detector.errors import InputError
from detector.kernels.processor import instruction_set

CpuKernels = Literal["auto", "winograd", "onednn", "plain"]

_CHANNELS, _MORE_CHANNELS, _CELLS = 128, 256, 500
"""From which sizes on Winograd's algorithm is faster: of one side, of the other, and of the map."""


@dataclass(frozen=True)
class CpuPaths:
    """The special paths of all networks of a process, on CPUs.

    Attributes:
        name: How the command line names them.
        one_pass: Layers with their ReLU, and fully connected layers in float32, by oneDNN's own functions.
        strips: VGG16's large maps in strips of rows, where no gradient is needed.
        winograd: Large 3 x 3 convolutions in float32 by Winograd's algorithm, where no gradient is needed.
        trained_winograd: And where gradients are needed, these too.
    """

    name: str
    one_pass: bool
    strips: bool
    winograd: bool
    trained_winograd: bool

    def winograd_for(self, x: Tensor, weight: Tensor, trained: bool) -> bool:
        """Return whether the convolution of `x` (B, C, H, W) with `weight` (D, C, 3, 3) is by Winograd's algorithm."""
        channels_out, channels_in = weight.shape[:2]
        return self._winograd(x, trained) and channels_in >= _CHANNELS and channels_out >= _MORE_CHANNELS

    def winograd_for_gradients(self, x: Tensor, weight: Tensor) -> tuple[bool, bool]:
        """Return whether the gradients of `x` and of `weight` are by Winograd's algorithm."""
        channels_out, channels_in = weight.shape[:2]
        worth = self._winograd(x, trained=True) and min(channels_in, channels_out) >= _CHANNELS
        return worth and channels_in >= _MORE_CHANNELS, worth

    def _winograd(self, x: Tensor, trained: bool) -> bool:
        return (self.trained_winograd if trained else self.winograd) and x.shape[2] * x.shape[3] >= _CELLS


_PATHS: Final = {
    paths.name: paths
    for paths in (
        CpuPaths("winograd", one_pass=True, strips=True, winograd=True, trained_winograd=True),
        CpuPaths("onednn", one_pass=True, strips=True, winograd=True, trained_winograd=False),
        CpuPaths("plain", one_pass=False, strips=False, winograd=False, trained_winograd=False),
    )
}
_chosen: CpuKernels = "auto"


def cpu_paths() -> CpuPaths:
    """Return the paths that are taken now."""
    return _PATHS[automatic_kernels(instruction_set()) if _chosen == "auto" else _chosen]


def use_cpu_kernels(kernels: CpuKernels) -> str:
    """Let the networks of this process take the paths of that name, and return a line that says which and why."""
    global _chosen
    check_cpu_kernels(kernels)
    _chosen = kernels
    if kernels != "auto":
        return f"cpu_kernels {kernels}"
    return f"cpu_kernels auto: {cpu_paths().name}, this processor's instructions are {instruction_set()}"


@lru_cache
def automatic_kernels(instructions: str) -> str:
    """Return the name of the paths that are fastest with these instructions, named as by `instruction_set`."""
    return "winograd" if instructions in ("avx2",) else "onednn"


def check_cpu_kernels(kernels: str) -> None:
    """Raises InputError for paths that there are not."""
    if kernels not in ("auto", *_PATHS):
        raise InputError(f"--model.cpu_kernels {kernels}: choose auto, {', '.join(_PATHS)}")
