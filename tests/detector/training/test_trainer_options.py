"""Lightning's own options under this module: clipping and accumulation of gradients, on one small detector."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.training.lightning_module import FasterRCNNModule
from detector.training.optimization import OptimizerConfig

EVERY = {"samples_per_image": 10**5, "positive_fraction": 1.0}  # nothing is drawn


def example(seed: int, box: list[float], label: int) -> tuple[Tensor, dict[str, Tensor]]:
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return image, {"boxes": torch.tensor([box]), "labels": torch.tensor([label]), "difficult": torch.tensor([False])}


EXAMPLES = [example(0, [3.0, 5.0, 40.0, 30.0], 1), example(1, [50.0, 20.0, 90.0, 60.0], 2)]


def collate(batch: list[Any]) -> tuple[list[Any], list[Any]]:
    return [image for image, _ in batch], [target for _, target in batch]


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


CONSTANT = OptimizerConfig(lr=0.01, momentum=0.0, weight_decay=0.0, warmup_steps=0, schedule="constant")


def update(
    examples: list[Any], optimizer: OptimizerConfig = CONSTANT, batch_size: int = 1, **options: Any
) -> tuple[Tensor, int]:
    """Change of all weights by a training with plain gradient descent at a rate of 1 / 100, and its number of steps."""
    torch.manual_seed(0)
    module = FasterRCNNModule(
        ["a", "b"],
        BackboneConfig("small_c4", weights=None, frozen_stages=0, box_head_channels=16),
        AnchorConfig([1, 2], [0.5, 2], straddling="keep"),
        RPNConfig(**EVERY, post_nms_train=20, pre_nms_train=40),
        RoIConfig(**EVERY),
        ImageConfig([64], 96),
        optimizer,
    )
    before = weights(module)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(examples, batch_size=batch_size, collate_fn=collate))
    return weights(module) - before, trainer.global_step


class Rates(pl.Callback):
    """The learning rate of each optimiser step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.values.append(optimizer.param_groups[0]["lr"])


def test_gradient_clipping_limits_the_norm_of_all_gradients() -> None:
    free, _ = update(EXAMPLES[:1])
    assert float(free.norm()) > 0.004
    clipped, _ = update(EXAMPLES[:1], gradient_clip_val=0.1)
    assert float(clipped.norm()) == pytest.approx(0.01 * 0.1, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), atol=1e-4, rtol=1e-2)
    loose, _ = update(EXAMPLES[:1], gradient_clip_val=1e4)
    torch.testing.assert_close(loose, free)


def test_accumulated_gradients_are_the_mean_of_their_batches() -> None:
    (first, _), (second, _) = update(EXAMPLES[:1]), update(EXAMPLES[1:])
    both, steps = update(EXAMPLES, accumulate_grad_batches=2)
    assert steps == 1
    torch.testing.assert_close(both, (first + second) / 2, atol=1e-6, rtol=1e-3)
    assert update(EXAMPLES)[1] == 2


def test_accumulated_batches_of_two_images_are_averaged_too() -> None:
    """Each batch's losses are divided by its own numbers of samples, and then the batches are averaged."""
    examples = [*EXAMPLES, example(2, [10.0, 8.0, 30.0, 50.0], 2), example(3, [20.0, 4.0, 60.0, 60.0], 1)]
    first, second = (update(examples[start : start + 2], batch_size=2)[0] for start in (0, 2))
    both, steps = update(examples, batch_size=2, accumulate_grad_batches=2)
    assert steps == 1
    torch.testing.assert_close(both, (first + second) / 2, atol=1e-6, rtol=1e-3)
    assert float((first - second).norm()) > 0.1 * float(first.norm())


def test_an_epochs_last_step_is_the_mean_of_the_batches_it_has() -> None:
    """Of three batches, two are the first step; the third is a step of its own, as large as with no accumulation."""
    images = [EXAMPLES[0], EXAMPLES[0], EXAMPLES[1]]
    alone, steps = update([EXAMPLES[0], EXAMPLES[1]])
    assert steps == 2
    accumulated, steps = update(images, accumulate_grad_batches=2)
    assert steps == 2
    torch.testing.assert_close(accumulated, alone, atol=1e-6, rtol=1e-3)


def test_schedules_count_optimiser_steps() -> None:
    """Two epochs of five batches, three steps each: warm-up over two of the six, then a quarter from step 3 on."""
    rates = Rates()
    config = OptimizerConfig(
        lr=0.01, warmup_steps=2, warmup_start=0.5, schedule="step", milestones=[0.5], gamma=0.25, weight_decay=0.0
    )
    _, steps = update(EXAMPLES[:1] * 5, config, accumulate_grad_batches=2, max_epochs=2, callbacks=[rates])
    assert steps == 6
    assert rates.values == pytest.approx([0.005, 0.0075, 0.01, 0.0025, 0.0025, 0.0025])
