"""The programs that `frcnn benchmark train|infer` times: steps or inferences of our detector and of torchvision's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import nn

from detector.faster_rcnn import FasterRCNN
from detector.training.compilation import compile_networks
from detector.training.optimization import OptimizerConfig, build_optimizer, parameter_groups
from experiments.benchmark.measuring import Run, this_device
from experiments.benchmark.models import Batch
from experiments.benchmark.options import PRECISIONS, NetworkOptions, TrainOptions
from experiments.run.host_memory import keep_freed_memory
from experiments.run.precision import native_precisions, say_cost

DTYPES: Final = dict(zip(PRECISIONS, (None, None, torch.bfloat16, torch.float16), strict=True))
SWEPT: Final = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16)}
"""Images per step of a sweep over them."""
PACKAGES: Final = ("torch", "torchvision", "numpy")


@dataclass(frozen=True)
class Setting:
    """The numbers, precisions and device of what is run; see `NetworkOptions`."""

    kind: Literal["train", "infer"]
    batch_sizes: Sequence[int] = (1,)
    precisions: Sequence[str] = ("32-true",)
    repeats: int = 5
    compile: bool = False
    time_limit: float = 900
    device: torch.device = field(default_factory=this_device)

    @property
    def step(self) -> str:
        """Name what is timed, for titles."""
        return "one training step" if self.kind == "train" else "one inference"


def chosen_setting(options: NetworkOptions) -> Setting:
    """Return what the options say, and what follows where they say nothing; tell what emulated precisions cost."""
    device = this_device()
    native = native_precisions(device.type)
    for precision in options.precisions or ():
        say_cost(precision, device.type, "auto", f"--precisions {native[-1]}")
    alone = isinstance(options, TrainOptions) and (options.devices is not None or options.callbacks)
    compared = options.sweep is None and not alone
    sizes = SWEPT[device.type] if options.sweep == "batch_size" else (1, 4) if compared else (1,)
    return Setting(
        options.kind,
        options.batch_sizes or sizes,
        options.precisions or (native if compared else ("32-true",)),
        options.repeats,
        options.compile,
        options.time_limit,
        device,
    )


def ready(model: FasterRCNN, setting: Setting) -> FasterRCNN:
    """Return our detector on the device, in training or evaluation, compiled if it is to be.

    The process keeps freed memory, as those of `frcnn fit` do.
    """
    keep_freed_memory(setting.device)
    model = model.to(setting.device).train(setting.kind == "train")
    if setting.compile:
        box_heads = [stage.box_head for stage in model.roi_heads.stages]
        compile_networks((model.backbone, model.rpn.head, *box_heads), "default", setting.device)
    return model


def our_program(model: FasterRCNN, batch: Batch, precision: str, setting: Setting) -> Run:
    """Return a training step, or an inference, of our detector."""
    if setting.kind == "infer":
        return program(lambda: model(batch[0]), None, precision, setting.device)
    return program(lambda: model.losses(*batch)["loss"], our_optimizer(model), precision, setting.device)


def peer_program(peer: nn.Module, batch: Batch, precision: str, setting: Setting) -> Run:
    """Return the same of torchvision's detector, which takes the images in 0..1."""
    peer.to(setting.device).train(setting.kind == "train")
    if setting.kind == "infer":
        return program(lambda: peer(batch[0]), None, precision, setting.device)
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-8, momentum=0.9, weight_decay=0.0005)
    return program(lambda: sum(peer(*batch).values()), optimizer, precision, setting.device)


def our_optimizer(model: FasterRCNN) -> torch.optim.Optimizer:
    """Return SGD as in training, with so small a learning rate that the weights stay what they are."""
    config = OptimizerConfig(lr=1e-8)
    return build_optimizer(parameter_groups(model, [], config), config)


def program(
    forward: Callable[[], Any], optimizer: torch.optim.Optimizer | None, precision: str, device: torch.device
) -> Run:
    """Return a training step on the loss that `forward` gives, or without an optimiser an inference."""

    def run() -> None:
        with products_of(precision):
            with torch.inference_mode(optimizer is None), autocast(precision, device):
                result = forward()
            if optimizer is not None:
                optimizer.zero_grad()
                result.backward()
                optimizer.step()

    return run


@contextmanager
def products_of(precision: str) -> Iterator[None]:
    """Let a GPU's float32 products be TensorFloat-32 where the precision is tf32; else they are as they were."""
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed or precision == "tf32"
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which Lightning runs a step of this precision."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
