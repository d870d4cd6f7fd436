"""Recipes of published systems: each takes an optimiser step."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from datamodules.voc.datamodule import VOCDataModule
from detector.training.lightning_module import FasterRCNNModule

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
VARIANTS = {name: (name, {}) for name in RECIPES} | {
    "step_by_step_vgg16_bn": ("step_by_step_vgg16", {"name": "vgg16_bn"})
}
LOSSES = {f"train/{name}" for name in ("loss", "loss_rpn_cls", "loss_rpn_reg", "loss_roi_cls", "loss_roi_reg")}


class Losses(pl.Callback):
    """Every loss that was logged, by name."""

    def __init__(self) -> None:
        self.logged: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for name, value in trainer.callback_metrics.items():
            if name in LOSSES:
                self.logged.setdefault(name, []).append(float(value))


def tiny(options: Any) -> dict[str, Any]:
    """The recipe's model options with random weights, for small images: anchors of an eighth, and few RoIs."""
    model: dict[str, Any] = options.model.as_dict()
    model["backbone"] |= {"weights": "none", "frozen_stages": 0, "norm": "batch", "pool_size": 2}
    scales = model["anchors"]["scales"]
    model["anchors"]["scales"] = [
        [scale / 8 for scale in level] if isinstance(level, list) else level / 8 for level in scales
    ]
    model["roi"]["samples_per_image"] = 16
    model["image"] |= {"shortest_side": [96], "longest_side": 160}
    if model["image"]["pixel_max"] == 255:
        model["image"]["std"] = [60, 60, 60]  # random weights do not expect 0 to 255
    return model


def train(
    mini_voc: Path, options: Any, model: dict[str, Any]
) -> tuple[FasterRCNNModule, dict[str, torch.Tensor], Losses]:
    """Train as the recipe says: one optimiser step, or six if they are the fewest of an alternating training.

    Returns the trained module, its weights from before, and its losses."""
    pl.seed_everything(0)
    data = VOCDataModule(
        str(mini_voc),
        ["train"],
        ["val"],
        augmentation=options.data.augmentation,
        batch_size=options.data.batch_size,
        num_workers=0,
        annotation_cache="none",
    )
    module = FasterRCNNModule(**(model | {"class_names": data.class_names}))
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6 if module.alternating else 1,
        accumulate_grad_batches=options.trainer.accumulate_grad_batches,
        gradient_clip_val=options.trainer.gradient_clip_val,
        gradient_clip_algorithm=options.trainer.gradient_clip_algorithm,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
    )
    trainer.fit(module, data)
    return module, before, losses


@pytest.fixture
def memory_given_back() -> Iterator[None]:
    """Trainers and modules refer to each other: without this, the networks of many tests would add up."""
    yield
    gc.collect()


@pytest.mark.usefixtures("memory_given_back")
@pytest.mark.parametrize("variant", VARIANTS)
def test_recipe_takes_an_optimiser_step(resolve_first_line, mini_voc, variant):
    name, backbone = VARIANTS[variant]
    options = resolve_first_line(RECIPES[name])
    model = tiny(options)
    model["backbone"] |= backbone
    module, before, losses = train(mini_voc, options, model)
    assert set(losses.logged) == LOSSES
    assert all(torch.tensor(values).isfinite().all() for values in losses.logged.values())
    after = dict(module.model.named_parameters())
    moved = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
    untouched = [key for key, parameter in after.items() if key not in moved and parameter.grad is None]
    assert untouched == []
    for part in ("backbone.", "rpn.head.", "roi_heads.box_head.", "roi_heads.predictor."):
        of_part = [key for key in after if key.startswith(part)]
        assert len(moved & set(of_part)) > 0.9 * len(of_part), part
