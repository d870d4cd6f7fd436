"""`--trainer.precision auto`: the fastest number format that the device computes natively; and what others cost."""

import inspect
import os
from functools import wraps
from time import perf_counter
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.accelerators import CUDAAccelerator, MPSAccelerator, XLAAccelerator
from pytorch_lightning.utilities import rank_zero_info

from detector.errors import InputError
from detector.image_batch import ImageConfig
from detector.kernels.processor import cpu_bfloat16

LARGE_INPUT = 16
"""Above what images are scaled to by their own mean and deviation: ImageNet's reach 2.6, caffe's 151."""
_HALF = (("bf16", torch.bfloat16), ("16", torch.float16))  # how names of precisions begin
_GPU_BFLOAT16 = (8, 0)  # compute capability; torch.cuda.is_bf16_supported(including_emulation=False), of any device


def _signature_with_auto() -> inspect.Signature:
    """Return Lightning's signature, from which the command line takes the types."""
    theirs = inspect.signature(pl.Trainer.__init__)
    precision = theirs.parameters["precision"]
    choices = Literal["auto"] | precision.annotation
    parameters = theirs.parameters | {"precision": precision.replace(annotation=choices)}
    return theirs.replace(parameters=list(parameters.values()))


class Trainer(pl.Trainer):
    """Lightning's Trainer, which also takes the precision `auto`.

    It means bf16-mixed where that is natively computed, else 16-mixed on tensor cores, else 32-true.

    The command line takes its types from here; `auto` is resolved before a Trainer is made.
    """

    @wraps(pl.Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    __init__.__signature__ = _signature_with_auto()  # type: ignore[attr-defined]


UNSUPPORTED = ("64", "64-true", "16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")
"""Those of Lightning's in which weights have another type than boxes and images, which are float32 everywhere."""


def check_precision(precision: Any, option: str = "--trainer.precision") -> None:
    """Raise InputError for one of Lightning's precisions with which nothing here can be computed."""
    if str(precision) in UNSUPPORTED:
        raise InputError(f"{option} {precision}: is not supported; there are 32-true, bf16-mixed, 16-mixed and auto")


def resolve_precision(
    precision: Any, accelerator: Any = "auto", devices: Any = "auto", option: str = "--trainer.precision"
) -> Any:
    """Return what the Trainer is to be given: `precision` itself, or what `auto` means here, which is then said.

    One line also says what a precision costs that the device emulates.

    Args:
        precision: As on the command line.
        accelerator: As the Trainer's; `auto` and `gpu` are those that it would choose.
        devices: As the Trainer's; of several GPUs the weakest decides.
        option: By which the user chooses another.
    """
    if precision == "auto":
        chosen, reason = automatic_precision(accelerator, devices)
        rank_zero_info(f"precision auto: {chosen}, {reason}")
        return chosen
    mixed_float16 = str(precision) in ("16", "16-mixed")
    computed = (
        "bf16-mixed" if mixed_float16 and accelerator_kind(accelerator) == "cpu" else precision
    )  # Lightning says so
    say_cost(computed, accelerator, devices, f"{option} auto")
    return precision


def say_cost(precision: Any, accelerator: Any, devices: Any, instead: str) -> None:
    """Say in one line what a precision costs that the device emulates, and what to write instead."""
    cost = emulation(precision, accelerator, devices)
    if cost is not None:
        rank_zero_info(f"warning: precision {precision} is slow here: {cost}. Better: {instead}")


def say_range(precision: Any, accelerator: Any, image: ImageConfig) -> None:
    """Say in one line where float16 may overflow: images of 0..255 with weights that were trained on such.

    A network of ReLUs without biases makes all its activations as many times greater as its input.
    """
    largest = max((image.pixel_max - mean) / std for mean, std in zip(image.mean, image.std, strict=True))
    if str(precision) in ("16", "16-mixed") and accelerator_kind(accelerator) != "cpu" and largest > LARGE_INPUT:
        rank_zero_info(
            f"warning: precision {precision} may overflow: the network's input reaches {largest:.0f} (image.pixel_max, "
            "mean, std), and float16 ends at 65504. Safer: bf16-mixed, where it is native, or 32-true"
        )


def native_precisions(accelerator: str) -> tuple[str, ...]:
    """Return float32, and what `auto` means on a device if that is another one."""
    return tuple(dict.fromkeys(("32-true", automatic_precision(accelerator)[0])))


def emulation(precision: Any, accelerator: Any = "auto", devices: Any = "auto") -> str | None:
    """Return why, and at what cost, the device emulates a precision; None where it does not, or nothing is known."""
    dtype = next((dtype for prefix, dtype in _HALF if str(precision).startswith(prefix)), None)
    kind = accelerator_kind(accelerator)
    if dtype is not None and kind == "cpu" and not _cpu_computes(dtype):
        name = str(dtype).removeprefix("torch.")
        return (
            f"this CPU has no {name} arithmetic and emulates it, so that a product of matrices takes "
            f"{slowdown(dtype):.1f} times as long as in float32"
        )
    if dtype == torch.bfloat16 and kind == "cuda" and CUDAAccelerator.is_available():
        capability, name = _weakest_gpu(devices)
        if capability < _GPU_BFLOAT16:
            return f"{name} has no bfloat16 arithmetic and emulates it, without tensor cores and slower than float32"
    return None


def slowdown(dtype: torch.dtype) -> float:
    """Measure how many times as long as in float32 a product of matrices takes on the CPU; in up to half a second."""
    times = []
    for kind in (torch.float32, dtype):
        matrix = torch.ones(256, 256, dtype=kind)  # no random numbers, which the training would miss
        runs = []
        for _ in range(3):
            start = perf_counter()
            matrix @ matrix
            runs.append(perf_counter() - start)
        times.append(min(runs))
    return times[1] / times[0]


def automatic_precision(accelerator: Any = "auto", devices: Any = "auto") -> tuple[str, str]:
    """Return the precision for a device, and why."""
    kind = accelerator_kind(accelerator)
    if kind == "cpu":
        found = cpu_bfloat16()
        return ("bf16-mixed", f"this CPU has {found}") if found else ("32-true", "this CPU has no bfloat16 arithmetic")
    if kind == "cuda" and CUDAAccelerator.is_available():
        return _gpu_precision(devices)
    return "32-true", f"nothing is known of mixed precision on the accelerator {kind}"


def _cpu_computes(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return cpu_bfloat16() is not None
    return _onednn_computes_float16()


def _onednn_computes_float16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _gpu_precision(devices: Any) -> tuple[str, str]:
    capability, name = _weakest_gpu(devices)
    if capability >= _GPU_BFLOAT16:
        return "bf16-mixed", f"{name} computes bfloat16"
    if capability >= (7, 0):
        return "16-mixed", f"{name} has tensor cores for float16 and none for bfloat16"
    return "32-true", f"{name} has no tensor cores"


def _weakest_gpu(devices: Any) -> tuple[tuple[int, int], str]:
    """Return compute capability and name of that one of several GPUs which decides.

    The process's own is the current one meanwhile: what CUDA sets up at the first question stays there.
    """
    try:
        count = CUDAAccelerator.auto_device_count()
        indices = CUDAAccelerator.parse_devices(count if devices in ("auto", None) else devices) or [0]
    except MisconfigurationException:  # the Trainer will say which devices there are
        indices = [0]
    rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    with torch.cuda.device(indices[rank % len(indices)]):
        capability, weakest = min((torch.cuda.get_device_capability(index), index) for index in indices)
        return capability, f"{torch.cuda.get_device_name(weakest)} (compute capability {capability[0]}.{capability[1]})"


def accelerator_kind(accelerator: Any) -> str:
    """Return the accelerator that Lightning will take."""
    gpus = (("mps", MPSAccelerator), ("cuda", CUDAAccelerator))
    if accelerator in ("auto", None):
        every = (("tpu", XLAAccelerator), *gpus)
        return next((name for name, kind in every if kind.is_available()), "cpu")
    if accelerator == "gpu":
        return next((name for name, kind in gpus if kind.is_available()), "cuda")
    return str(accelerator)
