"""The four steps: what each trains, on what, from which weights, and with which optimiser."""

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock, call

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detector.errors import InputError
from detector.training.alternating import AlternatingConfig, rebuild_ddp, step_ends
from detector.training.lightning_module import FasterRCNNModule
from detector.training.optimization import AveragedWeights, OptimizerConfig
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL

State = dict[str, Tensor]


def lightning_module(ema_decay: float = 0.0, **options: Any) -> FasterRCNNModule:
    torch.manual_seed(0)
    optimizer = OptimizerConfig("adamw", 0.001, warmup_steps=2, warmup_start=0.5, schedule="cosine")
    optimizer.ema_decay = ema_decay
    return FasterRCNNModule(
        ["cat", "dog"],
        SMALL,
        **OPTIONS,
        optimizer=optimizer,
        training_scheme="alternating",
        alternating=AlternatingConfig(**options),
    )


class Watch(pl.Callback):
    """The module's state in each optimiser step, before its first backward pass and at its end, and the rates."""

    def __init__(self) -> None:
        self.before: dict[int, State] = {}
        self.after: dict[int, State] = {}
        self.averages: dict[int, State] = {}
        self.rates: list[float] = []
        self.steps: list[int] = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.before.setdefault(trainer.global_step, state_of(pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.steps.append(pl_module.alternating.step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after[trainer.global_step - 1] = state_of(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for callback in trainer.callbacks:
            if isinstance(callback, AveragedWeights):
                self.averages[trainer.global_step - 1] = state_of(callback.averages)


def state_of(module: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def fit(module: FasterRCNNModule, batches: int, accumulate: int = 1, **options: Any) -> Watch:
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 1),
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
        **options,
    )
    trainer.fit(module, DataLoader([BATCH] * batches, batch_size=None))  # type: ignore[arg-type]
    return watch


def differing(first: State, second: State) -> set[str]:
    return {name for name in first if not torch.equal(first[name], second[name])}


def part(state: State, prefix: str, kind: Callable[[str], bool] = lambda name: True) -> State:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix) and kind(name)}


def is_weight(name: str) -> bool:
    """Not a statistic of batch norm, which a forward pass changes."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


# What each step trains, and from where


@pytest.fixture(scope="module")
def watched() -> Watch:
    return fit(lightning_module(), batches=8)


@pytest.mark.parametrize(
    ("step", "prefixes"),
    [
        (1, ("alternating.proposer.backbone.", "alternating.proposer.rpn.")),
        (2, ("model.backbone.", "model.roi_heads.")),
        (3, ("model.rpn.",)),
        (4, ("model.roi_heads.",)),
    ],
)
def test_a_step_changes_its_own_layers_and_no_bit_of_the_others(watched, step, prefixes):
    """Two optimiser steps each; statistics of batch norm count as the backbone's."""
    first, second = watched.after[2 * step - 2], watched.after[2 * step - 1]
    assert first.keys() == second.keys()
    assert differing(first, second) == {name for name in first if name.startswith(prefixes)}


def test_two_networks_in_the_first_two_steps_one_in_the_others(watched):
    for index, state in watched.after.items():
        assert any(name.startswith("alternating.") for name in state) == (index < 4)
    joint = FasterRCNNModule(["cat", "dog"], SMALL, **OPTIONS)
    assert watched.after[7].keys() == joint.state_dict().keys()


def test_where_each_step_starts_from(watched):
    initial = state_of(lightning_module())
    second, third, fourth = (watched.before[index] for index in (2, 4, 6))
    # Step 2: the initial weights again, and the proposer as step 1 left it.
    for prefix in ("model.backbone.", "model.roi_heads."):
        assert not differing(part(second, prefix, is_weight), part(initial, prefix))
    assert not differing(part(second, "alternating."), part(watched.after[1], "alternating."))
    # Step 3: new RPN layers on step 2's backbone. Step 4: all of what there is.
    assert not differing(part(third, "model.rpn."), part(initial, "model.rpn."))
    assert not differing(part(third, "model.backbone."), part(watched.after[3], "model.backbone."))
    assert not differing(fourth, watched.after[5])


def test_steps_2_and_3_may_go_on_from_the_first_network():
    watched = fit(lightning_module(restart_backbone=False, restart_rpn=False), batches=8)
    first = part(watched.after[1], "alternating.proposer.")
    backbone, rpn = part(first, "backbone.", is_weight), part(first, "rpn.")
    assert not differing(part(watched.before[2], "model.backbone.", is_weight), backbone)
    assert not differing(part(watched.before[4], "model.rpn."), rpn)
    for prefix, there in (("alternating.proposer.backbone.", backbone), ("alternating.proposer.rpn.", rpn)):
        assert differing(there, part(watched.after[0], prefix))  # which was trained
    assert not differing(part(watched.after[3], "alternating.proposer."), first)  # a copy, not the same tensors


def test_averages_end_a_step_and_begin_anew():
    watched = fit(lightning_module(ema_decay=0.9), batches=8)
    for last in (1, 3, 5):
        trained = ("alternating.", "model.backbone.", "model.rpn.")[last // 2]
        assert differing(part(watched.after[last], trained), part(watched.averages[last], trained))
    # The next step has the averages, not what was trained last.
    proposer = part(watched.before[2], "alternating.")
    assert not differing(proposer, part(watched.averages[1], "alternating."))
    assert not differing(part(watched.before[4], "model.backbone."), part(watched.averages[3], "model.backbone."))
    assert not differing(watched.before[6], watched.averages[5])
    # The first update of an average copies.
    for first in (2, 4, 6):
        assert not differing(watched.after[first], watched.averages[first])


# How long, and how fast


@pytest.mark.parametrize(
    ("shares", "total", "ends"),
    [
        ([1, 1, 1, 1], 1000, [250, 500, 750, 1000]),
        ([80_000, 40_000, 80_000, 40_000], 60, [20, 30, 50, 60]),
        ([0.1, 0.6, 0.1, 0.2], 33, [3, 23, 26, 33]),  # 3.3, 23.1, 26.4
    ],
)
def test_ends_by_hand(shares, total, ends):
    assert step_ends(shares, total) == ends


def test_boundaries_and_schedule_of_each_step():
    """Eight batches an epoch, two epochs; steps of 4, 8, 2 and 2 optimiser steps cross the epochs' end."""
    watched = fit(lightning_module(step_shares=[2, 4, 1, 1]), batches=8, max_epochs=2)
    assert watched.steps == [1] * 4 + [2] * 8 + [3] * 2 + [4] * 2
    expected = []
    for length in (4, 8, 2, 2):
        warm = [0.5, 0.75] + [1.0] * (length - 2)
        expected += [0.001 * warm[i] * 0.5 * (1 + math.cos(math.pi * i / length)) for i in range(length)]
    assert watched.rates == pytest.approx(expected)


def test_accumulated_batches_count_as_one_step():
    watched = fit(lightning_module(), batches=9, accumulate=2)
    assert watched.steps == [1, 2, 3, 3, 4]  # 5 optimiser steps, the last of one batch: ends 1.25, 2.5, 3.75, rounded
    for index in range(4):
        trained = ("alternating.", "model.backbone.", "model.rpn.", "model.rpn.")[index]
        assert differing(part(watched.before[index], trained), part(watched.after[index], trained))


def test_steps_without_epochs():
    assert fit(lightning_module(), batches=3, max_epochs=-1, max_steps=4).steps == [1, 2, 3, 4]


def test_development_runs_may_be_too_short():
    assert fit(lightning_module(), batches=3, fast_dev_run=1).steps == [3]  # ends 0.25, 0.5, 0.75, rounded
    assert fit(lightning_module(), batches=5, fast_dev_run=4).steps == [1, 2, 3, 4]


# Bad options


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([1, 1, 1], r"\[1, 1, 1\] has 3 numbers; give 4"),
        ([1, 0, 1, 1], r"\[1, 0, 1, 1\] must be positive"),
        ([1, 1, -1, 1], "must be positive"),
        ([1, 1, math.inf, 1], "must be positive"),
        ([1, 1, math.nan, 1], "must be positive"),
    ],
)
def test_bad_shares(shares, message):
    with pytest.raises(InputError, match=rf"alternating\.step_shares: .*{message}"):
        AlternatingConfig(shares)


def test_too_short_a_training_is_refused():
    with pytest.raises(InputError, match=r"of 3 optimiser steps leave the four steps \[1, 1, 0, 1\]"):
        fit(lightning_module(), batches=3)


def test_an_endless_training_is_refused():
    with pytest.raises(InputError, match=r"give trainer\.max_epochs or trainer\.max_steps"):
        fit(lightning_module(), batches=3, max_epochs=-1)


def test_nothing_that_steps_log_is_sent_to_the_device_for_it(monkeypatch):
    """Lightning makes a tensor of a number, on the module's device: a GPU would be waited for."""
    logged: dict[str, Any] = {}
    monkeypatch.setattr(FasterRCNNModule, "log", lambda self, name, value, **_: logged.update({name: value}))
    fit(lightning_module(), batches=4)
    assert logged.keys() >= {"train/alternating_step", "train/loss"}
    assert all(isinstance(value, Tensor) for value in logged.values())
    assert float(logged["train/alternating_step"]) == 4


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_ddp_is_built_when_a_gpu_has_written_the_weights_and_read_when_it_has_sent_them(monkeypatch, device):
    """Lightning builds it on a stream of its own, which waits for no other, and no other for it."""
    order = Mock()
    order.strategy.root_device = torch.device(device)
    monkeypatch.setattr(torch.cuda, "synchronize", order.wait)
    module: Any = object()
    rebuild_ddp(order.strategy, module)
    assert order.strategy.model is module
    waits = [call.wait()] if device == "cuda" else []
    assert order.mock_calls == [*waits, call.strategy.configure_ddp(), *waits]
