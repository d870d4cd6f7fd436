"""A small detector's options and a batch of two images, for tests of trainings."""

from typing import Any

import torch
from torch import Tensor

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig

SMALL = BackboneConfig("small_c4", weights=None, frozen_stages=0, pool_size=4, box_head_channels=32)
OPTIONS: dict[str, Any] = {
    "anchors": AnchorConfig([1, 2], [1], straddling="keep"),
    "rpn": RPNConfig(post_nms_train=30, post_nms_test=25),
    "roi": RoIConfig(samples_per_image=16, score_threshold=0.01),
    "image": ImageConfig([64], 96, pad_multiple=8),
}


def image(seed: int) -> Tensor:
    return torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def target(boxes: list[list[float]]) -> dict[str, Any]:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "difficult": torch.zeros(len(boxes), dtype=torch.bool),
    }


BATCH = ([image(0), image(1)], [target([[3, 5, 30, 30], [50, 20, 90, 60]]), target([[10, 20, 30, 60]])])
