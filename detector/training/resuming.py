"""A training that goes on under other options than those of its checkpoint: what may change, and how it takes effect.

Lightning restores the optimiser with the learning rates, decay and momentum that it had: changed options would be lost
without a word, and the first step after a longer schedule's start would have the shorter one's rate, which is 0 at its
end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from detector.errors import InputError, value_text
from detector.training.optimization import OptimizerConfig, lr_factor, optimizer_options

Changes = dict[str, tuple[Any, Any]]
NOT_READ = {"weights", "weights_predictor", "backbone.weights", "model.weights", "model.backbone.weights"}
"""Options of what a training begins with."""


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Changes:
    """Return the options that both have with different values: name with dots -> value before and value now."""
    changes: Changes = {}
    for key in (key for key in now if key in before):
        old, new = (list(value) if isinstance(value, tuple) else value for value in (before[key], now[key]))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes |= changed_options(old, new, f"{prefix}{key}.")
        elif old != new:
            changes[f"{prefix}{key}"] = (old, new)
    return changes


def changes_text(changes: Changes) -> str:
    """Return one line on what changes, for a log."""
    return "; ".join(
        f"{name}: {value_text(old)} in the checkpoint, {value_text(new)} "
        + ("has no effect: its weights go on" if name in NOT_READ else "from here on")
        for name, (old, new) in changes.items()
    )


def afresh(path: object) -> str:
    """Return the way out where a training cannot go on from a checkpoint, as part of a message."""
    return f"start a new training from its weights: weights {path} instead of ckpt_path"


def check_training_state(path: object, checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError unless a checkpoint holds all that a training goes on from."""
    kinds = {"optimizer_states": list, "lr_schedulers": list, "loops": Mapping, "epoch": int, "global_step": int}
    lacking = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    lacking += [key for key in ("optimizer_states", "lr_schedulers", "loops") if checkpoint.get(key) in ([], {})]
    try:
        int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError, ValueError, OverflowError):
        lacking = lacking or ["loops.fit_loop.epoch_progress"]
    if lacking:
        raise InputError(
            f"{path}: holds weights and no state of a training (no {', '.join(lacking)}), so none can go on; "
            f"{afresh(path)}"
        )


def check_resumption(
    path: object, checkpoint: Mapping[str, Any], options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> bool:
    """Check that a training can go on from a checkpoint, say what changes, and return whether the optimiser's do.

    Options and the groups of parameters are those of the model as it is now.

    Raises:
        InputError: The checkpoint holds no state of a training, or an optimiser of another kind or of other layers.
    """
    changes = changed_options(checkpoint.get("hyper_parameters", {}), options)
    check_training_state(path, checkpoint)
    for name in (name for name in changes if name.split(".")[:2] == ["optimizer", "name"]):
        old, new = changes[name]
        raise InputError(f"{path}: {name} {new} cannot go on from the state of {old}; {afresh(path)}")
    theirs = {group["name"]: len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]}
    ours = {group["name"]: len(group["params"]) for group in groups}
    if theirs != ours:
        causes = {f"model.{name}": values for name, values in changes.items() if name.startswith("backbone.")}
        because = f" ({changes_text(causes)})" if causes else ""
        raise InputError(
            f"{path}: its optimiser trains {sum(theirs.values())} tensors, with these options it would be "
            f"{sum(ours.values())}{because}; go on with the options of its run, or {afresh(path)}"
        )
    if changes:
        rank_zero_info(f"{path}: goes on with other options: {changes_text(changes)}")
    rates = {group["name"]: group.get("initial_lr") for group in checkpoint["optimizer_states"][0]["param_groups"]}
    other_rates = any(rates[group["name"]] != group["lr"] for group in groups)  # of another number of devices, too
    return other_rates or any(name.startswith("optimizer.") for name in changes)


def let_options_count(
    trainer: pl.Trainer, groups: Sequence[Mapping[str, Any]], config: OptimizerConfig, steps: float, schedule_only: bool
) -> None:
    """Let options count instead of those with which the optimiser was made or that Lightning has restored.

    `schedule_only` says that none but the length of the schedule, which has so many steps, may differ.
    """
    optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, LambdaLR)
    if not schedule_only:
        for group, ours in zip(optimizer.param_groups, groups, strict=True):
            group |= optimizer_options(config) | {**ours, "initial_lr": ours["lr"], "params": group["params"]}
        scheduler.base_lrs = [ours["lr"] for ours in groups]
    factor = lr_factor(config, steps)
    scheduler.lr_lambdas = [factor] * len(scheduler.base_lrs)
    rates = [base * factor(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
