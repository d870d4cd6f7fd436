"""`--trainer.precision auto`: the fastest number format that the device computes natively."""

import inspect
from functools import wraps
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator, MPSAccelerator, XLAAccelerator
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from detector.kernels.processor import cpu_bfloat16


def _signature_with_auto() -> inspect.Signature:
    """Lightning's signature, from which the command line takes the types."""
    theirs = inspect.signature(pl.Trainer.__init__)
    precision = theirs.parameters["precision"]
    choices = Literal["auto"] | precision.annotation
    parameters = theirs.parameters | {"precision": precision.replace(annotation=choices)}
    return theirs.replace(parameters=list(parameters.values()))


class Trainer(pl.Trainer):
    """Lightning's; precision `auto`: bf16-mixed where natively computed, else 16-mixed on tensor cores, else 32-true.

    The command line takes its types from here; `auto` is resolved before a Trainer is made.
    """

    @wraps(pl.Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    __init__.__signature__ = _signature_with_auto()  # type: ignore[attr-defined]


def resolve_precision(precision: Any, accelerator: Any = "auto", devices: Any = "auto") -> Any:
    """What the Trainer is to be given: `precision` itself, or what `auto` means here, which is then said in one line.

    Args:
        precision: As on the command line.
        accelerator: As the Trainer's; `auto` and `gpu` are those that it would choose.
        devices: As the Trainer's; of several GPUs the weakest decides.
    """
    if precision != "auto":
        return precision
    chosen, reason = automatic_precision(accelerator, devices)
    rank_zero_info(f"precision auto: {chosen}, {reason}")
    return chosen


def automatic_precision(accelerator: Any = "auto", devices: Any = "auto") -> tuple[str, str]:
    """The precision for a device, and why."""
    kind = _kind(accelerator)
    if kind == "cpu":
        found = cpu_bfloat16()
        return ("bf16-mixed", f"this CPU has {found}") if found else ("32-true", "this CPU has no bfloat16 arithmetic")
    if kind == "cuda" and CUDAAccelerator.is_available():
        return _gpu_precision(devices)
    return "32-true", f"nothing is known of mixed precision on the accelerator {kind}"


def _gpu_precision(devices: Any) -> tuple[str, str]:
    try:
        count = CUDAAccelerator.auto_device_count()
        indices = CUDAAccelerator.parse_devices(count if devices in ("auto", None) else devices) or [0]
    except MisconfigurationException:  # the Trainer will say which devices there are
        indices = [0]
    capability, weakest = min((torch.cuda.get_device_capability(index), index) for index in indices)
    name = f"{torch.cuda.get_device_name(weakest)} (compute capability {capability[0]}.{capability[1]})"
    if capability >= (8, 0):  # torch.cuda.is_bf16_supported(including_emulation=False), of any device
        return "bf16-mixed", f"{name} computes bfloat16"
    if capability >= (7, 0):
        return "16-mixed", f"{name} has tensor cores for float16 and none for bfloat16"
    return "32-true", f"{name} has no tensor cores"


def _kind(accelerator: Any) -> str:
    """The accelerator that Lightning will take."""
    gpus = (("mps", MPSAccelerator), ("cuda", CUDAAccelerator))
    if accelerator in ("auto", None):
        every = (("tpu", XLAAccelerator), *gpus)
        return next((name for name, kind in every if kind.is_available()), "cpu")
    if accelerator == "gpu":
        return next((name for name, kind in gpus if kind.is_available()), "cuda")
    return str(accelerator)
