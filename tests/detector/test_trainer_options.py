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
from detector.lightning_module import FasterRCNNModule
from detector.optimization import OptimizerConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig

EVERY = {"samples_per_image": 10**5, "positive_fraction": 1.0}  # nothing is drawn


def example(seed: int, box: list[float], label: int) -> tuple[Tensor, dict[str, Tensor]]:
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return image, {"boxes": torch.tensor([box]), "labels": torch.tensor([label]), "difficult": torch.tensor([False])}


EXAMPLES = [example(0, [3.0, 5.0, 40.0, 30.0], 1), example(1, [50.0, 20.0, 90.0, 60.0], 2)]


def collate(batch: list[Any]) -> tuple[list[Any], list[Any]]:
    return [image for image, _ in batch], [target for _, target in batch]


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def update(examples: list[Any], **options: Any) -> tuple[Tensor, int]:
    """Change of all weights by a training with plain gradient descent at a rate of 1 / 100, and its number of steps."""
    torch.manual_seed(0)
    module = FasterRCNNModule(
        ["a", "b"],
        BackboneConfig("small_c4", weights=None, frozen_stages=0, box_head_channels=16),
        AnchorConfig([1, 2], [0.5, 2], straddling="keep"),
        RPNConfig(**EVERY, post_nms_train=20, pre_nms_train=40),
        RoIConfig(**EVERY),
        ImageConfig([64], 96),
        OptimizerConfig(lr=0.01, momentum=0.0, weight_decay=0.0, warmup_steps=0, schedule="constant"),
    )
    before = weights(module)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(examples, batch_size=1, collate_fn=collate))
    return weights(module) - before, trainer.global_step


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
