"""Optimiser, learning-rate schedule and averaged weights of a detector."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from detector.errors import InputError, check_choices, check_range


@dataclass
class OptimizerConfig:
    """Optimiser and schedule.

    Args:
        name: `sgd` (every published system) or `adamw` (short trainings of small networks).
        lr: Learning rate after warm-up, of the pretrained layers' weights.
        momentum: Of SGD.
        weight_decay: L2 penalty (sgd) or decoupled decay (adamw).
        bias_lr_factor: Learning rate of biases relative to `lr`. Caffe's models and their ports (py-faster-rcnn,
            chenyuntc): 2; torchvision, detectron2: 1.
        bias_decay: Whether biases decay. Fast R-CNN, mx-rcnn, chenyuntc: false; py-faster-rcnn's VGG16, torchvision,
            detectron2: true.
        new_layer_lr_factor: Learning rate of the layers without pretrained weights (RPN, predictor) relative to `lr`.
        warmup_steps: Steps over which the learning rate rises linearly (py-faster-rcnn: 0; torchvision, detectron2: up
            to 1000).
        warmup_start: Its first value relative to `lr` (torchvision, detectron2: 0.001).
        schedule: `step` (times `gamma` at each milestone), `cosine` (to 0 at the end) or `constant`; only `constant`
            needs no length of the training, such as `--trainer.max_epochs`.
        milestones: Where `step` drops, as fractions of all steps; py-faster-rcnn: 50,000 of 70,000.
        gamma: Factor at each milestone.
        ema_decay: Decay of an exponential moving average of the weights, with which a run is validated and saved; 0:
            none.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0005
    bias_lr_factor: float = 1.0
    bias_decay: bool = True
    new_layer_lr_factor: float = 1.0
    warmup_steps: int = 500
    warmup_start: float = 0.001
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: list[float] = field(default_factory=lambda: [5 / 7])
    gamma: float = 0.1
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"optimizer.lr: {self.lr} must be positive")
        if any(not 0 < m < 1 for m in self.milestones):
            raise InputError(f"optimizer.milestones: {self.milestones} must be fractions of the training, in (0, 1)")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"optimizer.ema_decay: {self.ema_decay} must be in [0, 1)")
        check_choices("optimizer", self)
        if not 0 <= self.momentum < 1:
            raise InputError(f"optimizer.momentum: {self.momentum} must be in [0, 1)")
        for key in ("weight_decay", "bias_lr_factor", "new_layer_lr_factor", "warmup_steps", "gamma"):
            check_range(f"optimizer.{key}", getattr(self, key), 0)
        check_range("optimizer.warmup_start", self.warmup_start, 0, 1)


def lr_factor(config: OptimizerConfig, total_steps: float) -> Callable[[int], float]:
    """Learning rate relative to `lr` as a function of the step, warm-up included.

    Args:
        config: The schedule.
        total_steps: Optimiser steps of the whole training; infinite where only time or early stopping ends it.

    Raises:
        InputError: The schedule needs a length, and there is none.
    """
    drops = config.schedule == "cosine" or (config.schedule == "step" and config.milestones)
    if math.isinf(total_steps) and drops:
        raise InputError(
            f"optimizer.schedule: {config.schedule} needs the training's length: give --trainer.max_epochs or "
            "--trainer.max_steps, beside which max_time and early stopping may end it sooner, or "
            "--model.optimizer.schedule constant"
        )

    def factor(step: int) -> float:
        progress = min(step / max(total_steps, 1), 1.0)
        value = 1.0
        if config.schedule == "step":
            value = config.gamma ** sum(progress >= milestone for milestone in config.milestones)
        elif config.schedule == "cosine":
            value = 0.5 * (1 + math.cos(math.pi * progress))
        if step < config.warmup_steps:
            value *= config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
        return value

    return factor


def parameter_groups(
    model: nn.Module, new_layers: Iterable[nn.Module], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay: weights and biases, of pretrained and of new layers."""
    new = {id(p) for layer in new_layers for p in layer.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in new, name.endswith("bias")), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr
            * (config.new_layer_lr_factor if is_new else 1.0)
            * (config.bias_lr_factor if is_bias else 1.0),
            "weight_decay": config.weight_decay if config.bias_decay or not is_bias else 0.0,
            "name": ("new" if is_new else "pretrained") + ("_biases" if is_bias else "_weights"),
        }
        for (is_new, is_bias), parameters in sorted(groups.items())
    ]


def optimizer_options(config: OptimizerConfig) -> dict[str, Any]:
    """Of all groups of the optimiser alike, by their names in PyTorch."""
    momentum = {"momentum": config.momentum} if config.name == "sgd" else {}
    return {"weight_decay": config.weight_decay, **momentum}


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`, fused: one pass over the weights instead of one per operation."""
    kind = torch.optim.SGD if config.name == "sgd" else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = kind(groups, lr=config.lr, fused=True, **optimizer_options(config))
    # Gradients are to be unscaled before the step, where Lightning clips them, not within it.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


class _Averages(AveragedModel):
    """A moving average of all parameters and buffers of a model.

    The number of updates is kept on the CPU: read from a GPU, it would hold up the CPU in every step.

    Args:
        model: What is averaged; the first update copies it.
        device: Where the averages are.
        decay: As of `AveragedWeights`.
    """

    def __init__(self, model: nn.Module, device: torch.device, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.module.to(device)  # and not the number of updates
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Add the weights of `model`, which has the same parts."""
        updates = int(self.n_averaged)
        averages = [*self.module.parameters(), *self.module.buffers()]
        currents = [*model.parameters(), *model.buffers()]
        pairs = list(zip(averages, currents, strict=True))
        floats = [(mean, current) for mean, current in pairs if mean.is_floating_point() and updates]
        if floats:
            weight = 1 - min(self.decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_([mean for mean, _ in floats], [current for _, current in floats], weight)
        for mean, current in pairs:
            if not (mean.is_floating_point() and updates):
                mean.copy_(current)
        self.n_averaged += 1


class AveragedWeights(WeightAveraging):
    """Exponential moving average of the weights, used for validation and saved as the checkpoint's weights.

    The decay rises to `decay` as (1 + n) / (10 + n) over the first updates, so that early validations are meaningful.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._validating = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the averages where the module will be trained; it is itself still on the CPU, where Lightning would
        leave them, and copy all weights there in every step."""
        if stage == "fit":
            self._average_model = _Averages(pl_module, trainer.strategy.root_device, self.decay)

    def copy_to(self, pl_module: pl.LightningModule) -> None:
        """Let the module go on with the averages."""
        self._copy_average_to_current(pl_module)

    def _copy_average_to_current(self, pl_module: pl.LightningModule) -> None:
        super()._copy_average_to_current(pl_module)
        _say_changed(pl_module)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        super()._swap_models(pl_module)
        _say_changed(pl_module)

    def restart(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew from the module as it is, with the parameters that it has now."""
        self.setup(trainer, pl_module, "fit")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._validating = self._average_model is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._validating = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """An interrupt during validation finds the averaged weights in the model: put the current ones back."""
        if self._validating:
            self._swap_models(pl_module)
            self._validating = False


def _say_changed(module: nn.Module) -> None:
    """Count up the versions of weights that were written through `.data`, which does not: others keep copies."""
    torch.autograd.graph.increment_version([*module.parameters(), *module.buffers()])


def share_of_step(loss: Tensor, batch: int, batches: float, of_step: int) -> Tensor:
    """Return the loss of a batch, so scaled that a step's gradient is the mean over its accumulated batches.

    Lightning divides by `accumulate_grad_batches`; an epoch's last step may have fewer batches.

    Args:
        loss: Of the batch.
        batch: Its number in the epoch, from 0.
        batches: Of the epoch; may be infinite.
        of_step: `accumulate_grad_batches`.
    """
    last = int(batches) % of_step if math.isfinite(batches) else 0
    return loss * (of_step / last) if last and batch >= batches - last else loss
