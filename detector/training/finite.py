"""The end of a training at its first loss that is not finite, before weights that are not are saved."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from detector.errors import InputError, TrainingError, printable

HELP = (
    "a smaller optimizer.lr, more optimizer.warmup_steps or trainer.gradient_clip_val may help; earlier checkpoints "
    "are as they were"
)
Seen = tuple[int, Sequence[str], Mapping[str, Tensor]]
"""A batch's optimiser step, counted from 1, the names of its images, and its losses."""


class FiniteLosses(pl.Callback):
    """Stop a training at the first loss that is not finite, and before weights that are not are validated or saved.

    On one CPU each loss is looked at before its gradients are computed. To look at a number, a program has to wait for
    a GPU, and all ranks have to agree: there losses are kept, and looked at now and then, and before every validation
    and checkpoint. What is named is the first one all the same.

    Args:
        every_n_batches: How often, on GPUs and several ranks.

    Raises:
        TrainingError: With the step, its images, and its losses, or the first tensor of the weights.
    """

    def __init__(self, every_n_batches: int = 20) -> None:
        self.every_n_batches = every_n_batches
        self._names: list[str] = []
        self._seen: list[Seen] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the names of the batch's images."""
        self._names = [str(target["file_name"]) for target in batch[1] if "file_name" in target]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the losses, or look at them at once."""
        losses: Mapping[str, Tensor] = pl_module.last_losses  # type: ignore[assignment]
        self._seen.append((trainer.global_step + 1, self._names, losses))
        if self._at_once(trainer, loss.device):
            self._look(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the losses that have come together."""
        if len(self._seen) >= self.every_n_batches:
            self._look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at losses and weights."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module.state_dict())

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at losses and at the weights that would be saved, averaged ones included."""
        self._look(trainer, *(checkpoint.get(key, {}) for key in ("current_model_state", "state_dict")))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at losses and weights, also where nothing is saved."""
        self._look(trainer, pl_module.state_dict())

    @staticmethod
    def _at_once(trainer: pl.Trainer, device: torch.device) -> bool:
        return device.type == "cpu" and trainer.world_size == 1

    def _look(self, trainer: pl.Trainer, *states: Mapping[str, Tensor]) -> None:
        seen, self._seen = self._seen, []
        self._stop(trainer, *(first_bad(seen) or (0, "")))
        for name in map(first_not_finite, states):
            text = f"the weights are not finite after step {trainer.global_step}, first {name}; {HELP}"
            self._stop(trainer, trainer.global_step, text if name else "")

    def _stop(self, trainer: pl.Trainer, step: int, text: str) -> None:
        """Raise on all ranks where one has something to say: what it says, and the earliest if there are several."""
        if trainer.world_size > 1:
            if not trainer.strategy.reduce_boolean_decision(bool(text), all=False):
                return
            said: list[Any] = [(step, text)] * trainer.world_size
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_gather_object(said, (step, text))
            text = min(entry for entry in said if entry[1])[1]
        if text:
            raise TrainingError(text)


def first_bad(seen: Sequence[Seen]) -> tuple[int, str] | None:
    """Return the step of the first batch with a loss that is not finite, and a line on it; a GPU is waited for once."""
    if not seen:
        return None
    numbers = torch.cat([torch.stack([loss.float() for loss in losses.values()]) for _, _, losses in seen]).tolist()
    for step, names, losses in seen:
        values, numbers = numbers[: len(losses)], numbers[len(losses) :]
        if not all(map(math.isfinite, values)):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(losses, values, strict=True))
            images = ", ".join(map(printable, names)) or "not known"
            return step, f"the loss of step {step} is not finite: {shown}; images: {images}; {HELP}"
    return None


def first_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a number that is not finite; a GPU is waited for once."""
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    if not floats:
        return None
    # The extremes are NaN where there is one.
    finite = torch.stack([torch.stack(tensor.detach().aminmax()).isfinite().all() for tensor in floats.values()])
    return next((name for name, fine in zip(floats, finite.tolist(), strict=True) if not fine), None)


def check_finite(source: object, state: Mapping[str, Tensor]) -> None:
    """Raise InputError, which begins with `source`, unless all weights are finite."""
    if (name := first_not_finite(state)) is not None:
        raise InputError(
            f"{source}: its weights are not finite, first {name}: its training has diverged; give an earlier checkpoint"
        )
