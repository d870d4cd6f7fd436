"""What `frcnn benchmark train|infer` times: a training step or an inference, of our detector and of torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final, Literal

import torch
from torch import Tensor, nn

from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.training.compilation import compile_networks
from detector.training.optimization import OptimizerConfig, build_optimizer, parameter_groups
from experiments.benchmark.cases import processor
from experiments.benchmark.models import Batch
from experiments.benchmark.step_parts import synchronize
from experiments.run.host_memory import keep_freed_memory

Kind = Literal["train", "infer"]
DTYPES: Final = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How the networks are run.

    Args:
        kind: Training steps or inferences.
        device: Of both networks.
        repeats: Timed rounds; of each, the median counts.
        compile: Whether ours is compiled.
    """

    kind: Kind
    device: torch.device
    repeats: int
    compile: bool = False


@dataclass
class Program:
    """A network that can be run on a batch again and again, and its times in milliseconds."""

    run: Callable[[], object]
    times: list[float] = field(default_factory=list)


def check_numbers(batch_sizes: Sequence[int], precisions: Sequence[str], repeats: int) -> None:
    """Raises:
    InputError: A number below 1, or an unknown precision."""
    if repeats < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"--repeats {repeats} and --batch_sizes {list(batch_sizes)}: must be at least 1")
    for precision in precisions:
        if precision not in DTYPES:
            raise InputError(f"--precisions: {precision!r} is none of {', '.join(DTYPES)}")


def this_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ready(model: FasterRCNN, setting: Setting) -> FasterRCNN:
    """Our detector on the device, in training or evaluation, compiled if it is to be; the process keeps freed memory,
    as those of `frcnn fit` do."""
    keep_freed_memory(setting.device)
    model = model.to(setting.device).train(setting.kind == "train")
    if setting.compile:
        networks = (model.backbone, model.rpn.head, model.roi_heads.box_head)
        compile_networks(networks, "default", setting.device)
    return model


def our_program(model: FasterRCNN, batch: Batch, precision: str, setting: Setting) -> Program:
    """A training step, or an inference, of our detector."""
    images, targets = batch
    if setting.kind == "infer":

        def infer() -> object:
            with torch.inference_mode(), autocast(precision, setting.device):
                return model(images)

        return Program(infer)
    optimizer = our_optimizer(model)

    def step() -> None:
        with autocast(precision, setting.device):
            loss = model.losses(images, targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Program(step)


def our_optimizer(model: FasterRCNN) -> torch.optim.Optimizer:
    """SGD as in training, with so small a learning rate that the weights stay what they are."""
    config = OptimizerConfig(lr=1e-8)
    return build_optimizer(parameter_groups(model, [], config), config)


def peer_images(images: Sequence[Tensor]) -> list[Tensor]:
    """Images as torchvision's detectors take them, in 0..1; those that are so already stay."""
    return [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]


def peer_program(peer: nn.Module, batch: Batch, precision: str, setting: Setting) -> Program:
    """The same of torchvision's detector."""
    images = peer_images(batch[0])
    if setting.kind == "infer":

        def infer() -> object:
            with torch.inference_mode(), autocast(precision, setting.device):
                return peer(images)

        return Program(infer)
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-8, momentum=0.9, weight_decay=0.0005)

    def step() -> None:
        with autocast(precision, setting.device):
            loss = sum(peer(images, batch[1]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Program(step)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which Lightning runs a step of this precision."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def run_in_turn(programs: Sequence[Program], device: torch.device, repeats: int, seconds: float = 3.0) -> None:
    """Time all programs one after the other, round by round, after one round of warm-up, or two short ones.

    There are `repeats` rounds, or more where they are short: up to five times as many, until all took `seconds`.
    """
    for _ in range(2):
        start = perf_counter()
        for program in programs:
            program.run()
        synchronize(device)
        one_round = perf_counter() - start
        if one_round > 2 * seconds:
            break
    rounds = max(repeats, min(5 * repeats, int(seconds / one_round)))
    for number in range(rounds):
        order = programs if number % 2 == 0 else programs[::-1]
        for program in order:
            synchronize(device)
            start = perf_counter()
            program.run()
            synchronize(device)
            program.times.append(1000 * (perf_counter() - start))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {processor()}, {torch.get_num_threads()} threads"
