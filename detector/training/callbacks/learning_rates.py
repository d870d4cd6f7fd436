"""Learning rates, one curve for each schedule that differs from the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from detector.training.callbacks.inside_steps import log_scalars


class LearningRates(pl.Callback):
    """Log the learning rate of the coming step as `weights/learning_rate/<what it trains>`.

    Groups of weights whose rates are the same throughout share one curve: `all`; or `biases` and `weights`, `new` and
    `pretrained`, where these differ; or all names of the groups. Costs next to nothing.

    Args:
        every_n_steps: How often, in optimiser steps; null: as often as the losses; 0: never.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log, where that is due."""
        every, step = self.every_n_steps, trainer.global_step + 1
        if every is None:
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and batch_idx % trainer.accumulate_grad_batches == 0:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            rates = {f"weights/learning_rate/{name}": rate for name, rate in distinct_rates(groups).items()}
            log_scalars(trainer, rates, step - 1)


def distinct_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the rates of an optimiser's groups as they are now, each once, by the name of what it trains.

    Args:
        groups: With `name`, `lr` and, where a schedule changes that, `initial_lr`, as PyTorch keeps them.
    """
    by_start: dict[float, list[Mapping[str, Any]]] = {}
    for group in groups:
        by_start.setdefault(group.get("initial_lr", group["lr"]), []).append(group)
    names = {str(group["name"]) for group in groups}
    return {_name({str(group["name"]) for group in of}, names): float(of[0]["lr"]) for of in by_start.values()}


def _name(own: set[str], names: set[str]) -> str:
    """Return a name for some of the groups, which are called such as new_biases."""
    for part in sorted({part for name in own for part in name.split("_")}):
        if own != names and own == {name for name in names if part in name.split("_")}:
            return part
    return "all" if own == names else "+".join(sorted(own))
