"""Parameter groups, learning rates at given steps, and averaged weights, by hand."""

from math import cos, inf, pi
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detector.errors import InputError
from detector.training.optimization import (
    AveragedWeights,
    OptimizerConfig,
    build_optimizer,
    lr_factor,
    lr_scale,
    parameter_groups,
)


class TwoParts(nn.Module):
    """A pretrained part, of which one layer is frozen, and a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.GroupNorm(2, 4))
        self.body[0].requires_grad_(False)
        self.new = nn.Linear(4, 5)


def groups(**options: Any) -> dict[str, dict[str, Any]]:
    model = TwoParts()
    config = OptimizerConfig(lr=0.01, weight_decay=0.25, **options)
    return {group["name"]: group for group in parameter_groups(model, [model.new], config)}


@pytest.mark.parametrize(
    ("per_images", "batch_size", "devices", "accumulated", "scale"),
    [(0, 2, 4, 1, 1), (16, 2, 8, 1, 1), (16, 1, 1, 1, 1 / 16), (16, 2, 4, 3, 1.5), (256, 64, 8, 1, 2)],
)
def test_the_rate_follows_the_images_of_a_step(per_images, batch_size, devices, accumulated, scale) -> None:
    data = SimpleNamespace(batch_size=batch_size)
    trainer: Any = SimpleNamespace(datamodule=data, world_size=devices, accumulate_grad_batches=accumulated)
    assert lr_scale(OptimizerConfig(lr_per_images=per_images), trainer) == scale


def test_without_a_number_of_images_there_is_no_rate_for_it() -> None:
    trainer: Any = SimpleNamespace(datamodule=None)
    assert lr_scale(OptimizerConfig(), trainer) == lr_scale(OptimizerConfig(), None) == 1
    with pytest.raises(InputError, match=r"optimizer\.lr_per_images: needs a data module with a batch_size"):
        lr_scale(OptimizerConfig(lr_per_images=16), trainer)
    with pytest.raises(InputError, match="lr_per_images"):
        OptimizerConfig(lr_per_images=-1)


def test_groups_hold_every_trained_parameter_once() -> None:
    shapes = {name: [tuple(p.shape) for p in group["params"]] for name, group in groups().items()}
    assert shapes == {
        "pretrained_weights": [(4, 3), (4,)],
        "pretrained_biases": [(4,), (4,)],
        "new_weights": [(5, 4)],
        "new_biases": [(5,)],
    }


@pytest.mark.parametrize(
    ("options", "rates", "decays"),
    [
        ({}, (0.01, 0.01, 0.01, 0.01), (0.25, 0.25, 0.25, 0.25)),
        ({"bias_lr_factor": 2.0, "bias_decay": False}, (0.01, 0.02, 0.01, 0.02), (0.25, 0, 0.25, 0)),
        (
            {"bias_lr_factor": 2.0, "new_layer_lr_factor": 10.0},
            (0.01, 0.02, 0.1, 0.2),
            (0.25, 0.25, 0.25, 0.25),
        ),
    ],
)
def test_rates_and_decay_of_groups(
    options: dict[str, Any], rates: tuple[float, ...], decays: tuple[float, ...]
) -> None:
    names = ("pretrained_weights", "pretrained_biases", "new_weights", "new_biases")
    found = groups(**options)
    assert [found[name]["lr"] for name in names] == pytest.approx(rates)
    assert [found[name]["weight_decay"] for name in names] == pytest.approx(decays)


def test_scales_of_norms_need_not_decay() -> None:
    """The group norm's scale (4,), and a layer scale (5,), but not the matrices; shifts are biases."""
    model = TwoParts()
    model.new.register_parameter("gamma", nn.Parameter(torch.ones(5)))
    config = OptimizerConfig(lr=0.01, weight_decay=0.25, new_layer_lr_factor=2.0, bias_decay=False, norm_decay=False)
    found = [
        (group["name"], group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]])
        for group in parameter_groups(model, [model.new], config)
    ]
    assert found == [
        ("pretrained_weights", 0.01, 0.25, [(4, 3)]),
        ("pretrained_biases", 0.01, 0.0, [(4,), (4,)]),
        ("pretrained_norms", 0.01, 0.0, [(4,)]),
        ("new_weights", 0.02, 0.25, [(5, 4)]),
        ("new_biases", 0.02, 0.0, [(5,)]),
        ("new_norms", 0.02, 0.0, [(5,)]),
    ]
    with_them = OptimizerConfig(weight_decay=0.25, bias_decay=False)
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(model, [model.new], with_them)}
    expected = {"pretrained_weights": 0.25, "pretrained_biases": 0.0, "new_weights": 0.25, "new_biases": 0.0}
    assert decays == expected


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizer_keeps_the_groups(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    model = TwoParts()
    config = OptimizerConfig(name, lr=0.01, momentum=0.8, bias_lr_factor=2.0)
    optimizer = build_optimizer(parameter_groups(model, [model.new], config), config)
    assert type(optimizer) is kind
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.01, 0.01, 0.02, 0.02]
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def test_a_schedule_multiplies_the_rate_of_each_group() -> None:
    model = TwoParts()
    config = OptimizerConfig(lr=0.01, bias_lr_factor=2.0, warmup_steps=4, warmup_start=0.2, milestones=[0.5])
    optimizer = build_optimizer(parameter_groups(model, [model.new], config), config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(config, 10))
    seen = []
    for _ in range(7):
        seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    assert [step["new_weights"] for step in seen] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.001, 0.001])
    assert [step["new_biases"] for step in seen] == pytest.approx([2 * step["new_weights"] for step in seen])


def test_steps_by_hand() -> None:
    factor = lr_factor(OptimizerConfig(warmup_steps=10, warmup_start=0.1, milestones=[0.5, 0.75]), 100)
    expected = {0: 0.1, 1: 0.19, 5: 0.55, 9: 0.91, 10: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01, 120: 0.01}
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_the_papers_drop_after_50000_of_70000_steps() -> None:
    factor = lr_factor(OptimizerConfig(warmup_steps=0), 70_000)
    assert [factor(step) for step in (0, 49_999, 50_000, 69_999)] == pytest.approx([1, 1, 0.1, 0.1])


def test_cosine_by_hand() -> None:
    factor = lr_factor(OptimizerConfig(schedule="cosine", warmup_steps=20, warmup_start=0), 80)
    quarter = 0.5 * (1 + cos(pi / 4))
    expected = {0: 0, 10: 0.5 * (1 + cos(pi / 8)) / 2, 20: quarter, 40: 0.5, 60: 1 - quarter, 80: 0, 90: 0}
    assert {step: factor(step) for step in expected} == pytest.approx(expected, abs=1e-12)


def test_constant() -> None:
    factor = lr_factor(OptimizerConfig(schedule="constant", warmup_steps=2, warmup_start=0.5), 10)
    assert [factor(step) for step in (0, 1, 2, 9)] == [0.5, 0.75, 1, 1]
    assert lr_factor(OptimizerConfig(warmup_steps=0), 0)(0) == 1  # nothing to train: no division by zero


def test_schedule_without_a_length() -> None:
    for config in (
        OptimizerConfig(schedule="constant", warmup_steps=2),
        OptimizerConfig(milestones=[], warmup_steps=2),
    ):
        factor = lr_factor(config, inf)
        assert [factor(step) for step in (2, 10**9)] == [1, 1]
    for config in (OptimizerConfig(schedule="cosine"), OptimizerConfig()):
        with pytest.raises(InputError, match=f"schedule: {config.schedule} needs the training's length.*max_epochs"):
            lr_factor(config, inf)


class Counter(pl.LightningModule):
    """A weight that grows by 1 in every step; what it is in each validation is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.in_training: list[float] = []
        self.in_validation: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.in_training.append(float(self.weight.detach()))
        return -self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.in_validation.append(float(self.weight.detach()))


@pytest.mark.parametrize(
    ("decay", "averages"),
    [
        # Decays 2/11, 3/12, 4/13 after the first update, which copies.
        (0.999, [1, 2 - 2 / 11, 3 - 3 / 12 * (1 + 2 / 11), None]),
        # Never more than 0.2.
        (0.2, [1, 2 - 2 / 11, 3 - 0.2 * (1 + 2 / 11), None]),
    ],
)
def test_average_by_hand(decay: float, averages: list[float | None]) -> None:
    third = averages[2]
    assert third is not None
    averages[3] = 4 - min(decay, 4 / 13) * (4 - third)
    module = Counter()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AveragedWeights(decay)],
    )
    data = DataLoader([torch.zeros(1)] * 4)
    trainer.fit(module, data, DataLoader([torch.zeros(1)]))
    assert module.in_validation == pytest.approx(averages)
    assert module.in_training == [0, 1, 2, 3]  # training goes on with its own weights
    assert float(module.weight.detach()) == pytest.approx(averages[3])  # the end has the average


def test_averages_are_on_the_device_of_the_training_and_read_nothing_from_it() -> None:
    """The callback is set up before the module is moved. A tensor on the device `meta` has no values to be read."""
    module, callback = Counter(), AveragedWeights(0.9)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    callback.setup(trainer, module, "fit")  # type: ignore[arg-type]
    assert module.weight.device.type == "cpu"
    assert {tensor.device.type for tensor in callback.averages.state_dict().values()} == {"meta"}
    for trainer.global_step in (1, 2, 2, 3):  # the second batch of step 3 is no step
        callback.on_train_batch_end(trainer, module.to("meta"), None, None, 0)  # type: ignore[arg-type]
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    callback.on_save_checkpoint(trainer, module, checkpoint)  # type: ignore[arg-type]
    assert checkpoint["averaging_state"]["n_averaged"] == 3


def test_swapped_weights_are_seen_to_have_changed() -> None:
    module, callback = Counter(), AveragedWeights(0.9)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    callback.setup(trainer, module, "fit")  # type: ignore[arg-type]
    for change in (callback.on_validation_epoch_start, callback.on_validation_epoch_end, callback.on_train_end):
        version = module.weight._version
        change(trainer, module)  # type: ignore[arg-type]
        assert module.weight._version > version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"optimizer\.lr: 0\.0"),
        ({"milestones": [0.5, 1.5]}, r"optimizer\.milestones: \[0\.5, 1\.5\]"),
        ({"ema_decay": 1.0}, r"optimizer\.ema_decay: 1\.0"),
        ({"name": "adam"}, r"optimizer\.name: 'adam' is none of sgd, adamw"),
        ({"momentum": 1.0}, r"optimizer\.momentum: 1\.0"),
        ({"warmup_steps": -1}, r"optimizer\.warmup_steps: -1 must be >= 0"),
        ({"warmup_start": 2.0}, r"optimizer\.warmup_start: 2\.0 must be in \[0, 1\]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**options)
