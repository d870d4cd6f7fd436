"""Optimiser, learning-rate schedule and averaged weights of a detector."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from detector.backbones.base import Backbone
from detector.errors import InputError, check_numbers
from detector.parts import Part, chosen, name_of, settle


class OptimizerPart(Part):
    """An optimiser, `optimizer.name`."""

    @abstractmethod
    def __call__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return an optimiser over groups of parameters, each of which has its own `lr` and `weight_decay`."""


@dataclass
class SGD(OptimizerPart):
    """Stochastic gradient descent, fused: one pass over the weights instead of one per operation.

    Args:
        momentum: Share of the last step that is added to each.
    """

    momentum: float = 0.9

    def __call__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.SGD(groups, lr=lr, fused=True, weight_decay=weight_decay, momentum=self.momentum)


class AdamW(OptimizerPart):
    """Adam with decoupled weight decay, fused."""

    def __call__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.AdamW(groups, lr=lr, fused=True, weight_decay=weight_decay)


class Schedule(Part):
    """The course of the learning rate, `optimizer.schedule`, which options of the optimiser begin with a warm-up.

    Attributes:
        needs_length: Whether it depends on the training's length.
    """

    needs_length: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, progress: float, step: int) -> float:
        """Return the learning rate relative to `lr` in a step, counted from 0.

        `progress` is the share in 0..1 of all steps that came before; 0 where those have no number.
        """


@dataclass
class StepSchedule(Schedule):
    """A factor at each of some milestones.

    Args:
        milestones: Fractions of all steps.
        gamma: The factor.
    """

    milestones: list[float]
    gamma: float = 0.1

    @property
    def needs_length(self) -> bool:  # type: ignore[override]
        """Return whether there are milestones."""
        return bool(self.milestones)

    def __call__(self, progress: float, step: int) -> float:
        """Return the learning rate relative to `lr`; see `Schedule`."""
        return float(self.gamma ** sum(progress >= milestone for milestone in self.milestones))


class Cosine(Schedule):
    """Half a period of a cosine, to 0 at the end (Loshchilov 2017)."""

    def __call__(self, progress: float, step: int) -> float:
        """Return the learning rate relative to `lr`; see `Schedule`."""
        return 0.5 * (1 + math.cos(math.pi * progress))


class Constant(Schedule):
    """Always the same learning rate."""

    needs_length = False

    def __call__(self, progress: float, step: int) -> float:
        """Return 1."""
        return 1.0


@dataclass
class OptimizerConfig:
    """Optimiser and schedule.

    Args:
        name: `sgd` (every published system), `adamw` (short trainings of small networks), or an optimiser of one's own.
        lr: Learning rate after warm-up, of the pretrained layers' weights.
        momentum: Of SGD.
        weight_decay: L2 penalty (sgd) or decoupled decay (adamw).
        bias_lr_factor: Learning rate of biases relative to `lr`. Caffe's models and their ports (py-faster-rcnn,
            chenyuntc): 2; torchvision, detectron2: 1.
        bias_decay: Whether biases decay. Fast R-CNN, mx-rcnn, chenyuntc: false; py-faster-rcnn's VGG16, torchvision,
            detectron2: true.
        norm_decay: Whether scales of norms, and all else of one dimension but biases, such as ConvNeXt's layer scales,
            decay. ConvNeXt, Swin: false, with `bias_decay` false; torchvision: true.
        new_layer_lr_factor: Learning rate of the layers without pretrained weights (RPN, predictor) relative to `lr`.
        layer_decay: Learning rate of each stage of the backbone's body relative to the next one's, and of the last one
            relative to `lr`: with 0.7 a ResNet's five have 0.17, 0.24, 0.34, 0.49 and 0.7 of it (mmdetection's
            ConvNeXts: 0.7 or 0.95, in layers of their own). Stages are those of `backbone.frozen_stages`. 1: all have
            `lr`.
        warmup_steps: Steps over which the learning rate rises linearly (py-faster-rcnn: 0; torchvision, detectron2: up
            to 1000).
        warmup_start: Its first value relative to `lr` (torchvision, detectron2: 0.001).
        schedule: `step` (times `gamma` at each milestone), `cosine` (to 0 at the end) or `constant`; only `constant`
            needs no length of the training, such as `max_epochs` of the trainer. Or a schedule of one's own.
        milestones: Where `step` drops, as fractions of all steps; py-faster-rcnn: 50,000 of 70,000.
        gamma: Factor at each milestone.
        ema_decay: Decay of an exponential moving average of the weights, with which a run is validated and saved; 0:
            none.
        skip_nonfinite: So many steps with a loss or gradient that is not finite are left out; the next one stops the
            training. TensorBoard shows their number.
        lr_per_images: How many images an optimiser step has, over all devices and accumulated batches, where `lr` is
            right: with n images it is `lr` * n / `lr_per_images` (torchvision, detectron2: 16). A training that goes on
            with another number of devices has their learning rate from there on. 0: `lr` as it is.
    """

    name: Literal["sgd", "adamw"] | OptimizerPart = "sgd"
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0005
    bias_lr_factor: float = 1.0
    bias_decay: bool = True
    norm_decay: bool = True
    new_layer_lr_factor: float = 1.0
    layer_decay: float = 1.0
    warmup_steps: int = 500
    warmup_start: float = 0.001
    schedule: Literal["step", "cosine", "constant"] | Schedule = "step"
    milestones: list[float] = field(default_factory=lambda: [5 / 7])
    gamma: float = 0.1
    ema_decay: float = 0.0
    skip_nonfinite: int = 0
    lr_per_images: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "(0, inf]": "lr",
            "(0, 1]": "layer_decay",
            "(0, 1)": "milestones",
            "[0, 1)": "ema_decay momentum",
            "[0, 1]": "warmup_start",
            "[0, inf)": "skip_nonfinite lr_per_images",
            "[0, inf]": "weight_decay bias_lr_factor new_layer_lr_factor warmup_steps gamma",
        }
        check_numbers("optimizer", self, allowed)
        settle("optimizer", self)


def lr_scale(config: OptimizerConfig, trainer: pl.Trainer | None) -> float:
    """Return by what `lr_per_images` multiplies the learning rate.

    Raises:
        InputError: The data does not say how many images a batch has.
    """
    if not config.lr_per_images:
        return 1.0
    images = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if trainer is None or images is None:
        raise InputError("optimizer.lr_per_images: needs a data module with a batch_size; give 0, and the lr itself")
    return float(images * trainer.world_size * trainer.accumulate_grad_batches / config.lr_per_images)


def say_lr(config: OptimizerConfig, trainer: pl.Trainer) -> None:
    """Say in one line what `lr_per_images` makes of the learning rate, and in one what `layer_decay` makes of it."""
    if per := config.lr_per_images:
        images = round(per * lr_scale(config, trainer))
        rate = f"{config.lr:g} * {images} / {per} = {config.lr * images / per:g}"
        rank_zero_info(f"optimizer.lr_per_images {per}: a step has {images} images, so the learning rate is {rate}")
    if config.layer_decay < 1:
        rates = ", ".join(f"{group['name']} {group['initial_lr']:.3g}" for group in trainer.optimizers[0].param_groups)
        rank_zero_info(f"optimizer.layer_decay {config.layer_decay:g}: learning rates {rates}")


def lr_factor(config: OptimizerConfig, total_steps: float) -> Callable[[int], float]:
    """Return the learning rate relative to `lr` as a function of the step, warm-up included.

    The total is infinite where only time or early stopping ends the training.

    Raises:
        InputError: The schedule needs a length, and there is none.
    """
    steps = partial(StepSchedule, config.milestones, config.gamma)
    schedule = chosen(config.schedule, {"step": steps, "cosine": Cosine, "constant": Constant})
    if math.isinf(total_steps) and schedule.needs_length:
        raise InputError(
            f"optimizer.schedule: {name_of(config.schedule)} needs the training's length: give trainer.max_epochs or "
            "trainer.max_steps, beside which max_time and early stopping may end it sooner, or "
            "optimizer.schedule constant"
        )

    def factor(step: int) -> float:
        progress = min(step / max(total_steps, 1), 1.0)
        value = schedule(progress, step)
        if step < config.warmup_steps:
            value *= config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
        return value

    return factor


def parameter_groups(
    model: nn.Module, new_layers: Iterable[nn.Module], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Return trainable parameters by learning rate and decay: weights and biases, of pretrained and new layers.

    Without `norm_decay` the scales of norms have groups of their own, such as new_norms; with `layer_decay` those of
    each stage of a body have, such as stage3_weights.
    """
    new = {id(p) for layer in new_layers for p in layer.parameters()}
    decayed: dict[
        int, tuple[int, int]
    ] = {}  # id of a parameter -> its stage, counted from 1, and how many stages follow its input
    for backbone in (module for module in model.modules() if isinstance(module, Backbone) and config.layer_decay < 1):
        stages = backbone.body.stages()
        decayed |= {
            id(parameter): (place + 1, len(stages) - place)
            for place, stage in enumerate(stages)
            for layer in stage
            for parameter in layer.parameters()
        }
    groups: dict[tuple[bool, tuple[int, int], int], list[nn.Parameter]] = {}
    kinds = "weights", "biases", "norms"
    decays = config.weight_decay, config.weight_decay if config.bias_decay else 0.0, 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = 1 if name.endswith("bias") else 2 if parameter.dim() < 2 and not config.norm_decay else 0
            key = id(parameter) in new, decayed.get(id(parameter), (0, 0)), kind
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr
            * (config.new_layer_lr_factor if is_new else 1.0)
            * config.layer_decay**power
            * (config.bias_lr_factor if kind == 1 else 1.0),
            "weight_decay": decays[kind],
            "name": f"{'new' if is_new else f'stage{stage}' if stage else 'pretrained'}_{kinds[kind]}",
        }
        for (is_new, (stage, power), kind), parameters in sorted(groups.items())
    ]


def optimizer_options(config: OptimizerConfig) -> dict[str, Any]:
    """Return the options that all groups of the optimiser share, by their names in PyTorch."""
    momentum = {"momentum": config.momentum} if config.name == "sgd" else {}
    return {"weight_decay": config.weight_decay, **momentum}


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimiser over `parameter_groups`."""
    part = chosen(config.name, {"sgd": partial(SGD, config.momentum), "adamw": AdamW})
    optimizer = part(groups, config.lr, config.weight_decay)
    # Gradients are to be unscaled before the step, where Lightning clips them, not within it.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


class AveragedWeights(pl.Callback):
    """Exponential moving average of the weights, used for validation and saved as the checkpoint's weights.

    The decay rises to `decay` as (1 + n) / (10 + n) over the first updates, so that early validations are meaningful.
    Checkpoints are as those of Lightning's `WeightAveraging`, which would copy all weights to the CPU in every step.

    Args:
        decay: Of parameters and floating-point buffers; other buffers are copied.

    Attributes:
        averages: A copy of the module, with averaged weights; with the current ones while the module has these.
    """

    averages: nn.Module

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._updates = 0
        self._latest_step = 0
        self._validating = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the averages where the module will be trained, which is itself still on the CPU."""
        if stage == "fit":
            self.averages = deepcopy(pl_module).to(trainer.strategy.root_device)
            self._updates = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the weights of a new step; the first ones are copied."""
        if trainer.global_step <= self._latest_step:
            return
        self._latest_step = trainer.global_step
        pairs = self._pairs(pl_module)
        floats = [(mean, current) for mean, current in pairs if mean.is_floating_point() and self._updates]
        with torch.no_grad():
            if floats:
                weight = 1 - min(self.decay, (1 + self._updates) / (10 + self._updates))
                torch._foreach_lerp_([mean for mean, _ in floats], [current for _, current in floats], weight)
            for mean, current in pairs:
                if not (mean.is_floating_point() and self._updates):
                    mean.copy_(current)
        self._updates += 1

    def _pairs(self, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
        tensors = ([*one.parameters(), *one.buffers()] for one in (self.averages, module))
        return list(zip(*tensors, strict=True))

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the averages in the module."""
        for mean, current in self._pairs(pl_module):
            current.copy_(mean)

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap averages and weights: the averages are validated, and the training goes on from its own weights."""
        self._validating = not self._validating
        for mean, current in self._pairs(pl_module):
            kept = mean.clone()
            mean.copy_(current)
            current.copy_(kept)

    on_validation_epoch_end = on_validation_epoch_start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the module's own weights back after an interrupt during validation."""
        if self._validating:
            self.on_validation_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last update."""
        return {"latest_update_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that step."""
        self._latest_step = state_dict["latest_update_step"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the averages be the checkpoint's weights, and add the module's own."""
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = dict(self.averages.state_dict())
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._updates)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with a checkpoint's averages; of a training without them, its weights are the first."""
        self.averages.load_state_dict(checkpoint["state_dict"])
        if "current_model_state" in checkpoint:
            rank_zero_info("Found current_model_state in the checkpoint. This will be used to initialize the model.")
            pl_module.load_state_dict(checkpoint["current_model_state"])
            self._updates = int(checkpoint["averaging_state"]["n_averaged"])
        else:
            rank_zero_warn(
                "The checkpoint was not created with WeightAveraging. Both the current and the average model will be "
                "initialized with state_dict."
            )


def share_of_step(loss: Tensor, batch: int, batches: float, of_step: int) -> Tensor:
    """Return the loss of a batch, so scaled that a step's gradient is the mean over its accumulated batches.

    Lightning divides by `accumulate_grad_batches`, here `of_step`; an epoch's last step may have fewer batches. They
    are numbered from 0; the epoch may have infinitely many.
    """
    last = int(batches) % of_step if math.isfinite(batches) else 0
    return loss * (of_step / last) if last and batch >= batches - last else loss
