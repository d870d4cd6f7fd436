"""The end of a training at its first loss or gradient that is not finite, before it reaches the weights."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from detector.errors import InputError, TrainingError, printable
from detector.files import replacing

HELP = (
    "a smaller optimizer.lr, more optimizer.warmup_steps or trainer.gradient_clip_val may help; earlier checkpoints "
    "are as they were"
)


class Seen(NamedTuple):
    """A batch of the step at work.

    Args:
        images: As the network is given them.
        targets: Their ground truth.
        seed: Of what is random in the batch.
        losses: By name.
    """

    images: Sequence[Tensor]
    targets: Sequence[Mapping[str, Any]]
    seed: int
    losses: Mapping[str, Tensor]


class FiniteLosses(pl.Callback):
    """Stop a training at the first step whose losses or gradients are not finite, before the optimiser takes it.

    One number is looked at in every step, for which a program has to wait for a GPU. Several ranks all see the same
    gradients; a loss that is not finite spoils them (see `spoilt`). What a gradient scaler of 16-bit floats finds, to
    scale less, does not count. Weights are looked at before they are validated or saved.

    Args:
        skip: So many such steps are left out, and the next one stops the training.
        folder: Where a dump of the step is written, for `frcnn replay`; None: nowhere.

    Raises:
        TrainingError: With the step, its images, its losses, and the first gradient or weights.
    """

    def __init__(self, skip: int = 0, folder: Path | None = None) -> None:
        self.skip = skip
        self.folder = folder
        self.skipped = 0
        self._batch: Any = ((), ())
        self._seen: list[Seen] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the losses."""
        losses: Mapping[str, Tensor] = pl_module.last_losses  # type: ignore[assignment]
        (images, targets), self._batch = self._batch, ((), ())
        self._seen.append(Seen(images, targets, int(getattr(pl_module, "batch_seed", 0)), losses))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Look at losses and gradients."""
        seen, self._seen = self._seen, []
        trained = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        numbers = [torch.nn.utils.get_total_norm(trained)]  # infinite, too, if its squares are too large
        numbers += [loss.float() for one in seen for loss in one.losses.values()]
        if math.isfinite(torch.stack(numbers).sum()):
            return
        step = trainer.global_step + 1
        text = bad_loss(step, seen)
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        gradient = None if text else first_not_finite(gradients)
        bad, texts = text or gradient, _of_all_ranks(trainer, text)
        if not any(texts):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if gradient is None or (scaler is not None and scaler.get_scale() > 1):
                return
            losses = "; ".join(_shown(one) for one in seen)
            texts = [f"the gradient of step {step} is not finite, first of {gradient}; {losses}"]
        line = next(filter(None, texts))
        if self.skipped < self.skip:
            self.skipped += 1
            for parameter in pl_module.parameters():
                parameter.grad = None  # which all optimisers leave out
            for logger in trainer.loggers:
                logger.log_metrics({"weights/skipped_steps": self.skipped}, step)
            rank_zero_info(f"step left out, {self.skipped} of {self.skip} (optimizer.skip_nonfinite): {line}")
            return
        dump = self._dump(trainer, pl_module, seen, step) if bad else None
        again = f"frcnn replay {dump} runs it again; " if dump else ""
        raise TrainingError(f"{line}; {again}{HELP}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the weights."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module.state_dict())

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the weights that would be saved, averaged ones included."""
        self._look(trainer, *(checkpoint.get(key, {}) for key in ("current_model_state", "state_dict")))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the weights, also where nothing is saved."""
        self._look(trainer, pl_module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were left out."""
        return {"skipped": self.skipped} if self.skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    @staticmethod
    def _look(trainer: pl.Trainer, *states: Mapping[str, Tensor]) -> None:
        for name in map(first_not_finite, states):
            text = f"the weights are not finite after step {trainer.global_step}, first {name}; {HELP}" if name else ""
            for line in filter(None, _of_all_ranks(trainer, text)):
                raise TrainingError(line)

    def _dump(self, trainer: pl.Trainer, pl_module: Any, seen: Sequence[Seen], step: int) -> Path | None:
        """Write what `frcnn replay` needs, as a checkpoint with the batches of the step; None where that fails."""
        if self.folder is None:
            return None
        rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.folder / f"nonfinite_step{step}{rank}.pt"
        dump: dict[str, Any] = {
            "pytorch-lightning_version": version("pytorch-lightning"),
            "hyper_parameters": dict(pl_module.hparams),
            "state_dict": pl_module.state_dict(),
            "replay": {"step": step, "precision": str(trainer.precision), "cpu_kernels": pl_module.cpu_kernels},
        }
        dump["replay"]["device"] = trainer.strategy.root_device.type
        dump["replay"]["batches"] = [
            {**one._asdict(), "losses": {name: float(loss) for name, loss in one.losses.items()}} for one in seen
        ]
        pl_module.scheme.save(dump)
        with (
            contextlib.suppress(OSError, RuntimeError),
            replacing(path) as file,
        ):  # a full disk: the line is all there is
            torch.save(dump, file)
            return path
        return None


def spoilt(loss: Tensor) -> Tensor:
    """Return a loss whose gradients are not finite where it is not, as that of an infinite one may be; else the same.

    All ranks then find it in their common gradients, without asking each other.
    """
    return loss * (1 + 0 * loss.detach())


def bad_loss(step: int, seen: Sequence[Seen]) -> str:
    """Return a line on the first batch of a step with a loss that is not finite; empty where there is none."""
    for one in seen:
        if not all(math.isfinite(loss) for loss in one.losses.values()):
            return f"the loss of step {step} is not finite: {_shown(one)}"
    return ""


def _shown(one: Seen) -> str:
    losses = ", ".join(f"{name} {float(value):.4g}" for name, value in one.losses.items())
    images = ", ".join(printable(target["file_name"]) for target in one.targets if "file_name" in target)
    return f"{losses}; images: {images or 'not known'}"


def _of_all_ranks(trainer: pl.Trainer, text: str) -> list[str]:
    """Return what each rank has to say; all ask, and a GPU is waited for."""
    texts: list[Any] = [text] * trainer.world_size
    if trainer.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_gather_object(texts, text)
    return texts


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
