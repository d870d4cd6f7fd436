"""RoI heads and what they take, for the tests of the parts that they are made of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads

from detector.backbones.box_heads import TwoLayerHead
from detector.image_batch import ImageBatch
from detector.roi_heads import RoIConfig, RoIHeads
from detector.sampling import GroundTruth


@pytest.fixture(scope="session")
def heads() -> Callable[..., RoIHeads]:
    """`heads(classes=3, strides=(16,), pool_size=2, **options)`: RoI heads over features of five channels."""

    def make(classes: int = 3, strides: tuple[int, ...] = (16,), pool_size: int = 2, **options: Any) -> RoIHeads:
        return RoIHeads(TwoLayerHead(pool_size, 5, 8), strides, classes, RoIConfig(**options))

    return make


@pytest.fixture(scope="session")
def torchvision_heads() -> Callable[[RoIConfig], TorchvisionRoIHeads]:
    """`torchvision_heads(config)`: torchvision's RoI heads, without networks, that sample and select as ours do."""

    def make(config: RoIConfig) -> TorchvisionRoIHeads:
        weights = tuple(1 / std for std in config.delta_std)
        thresholds = config.score_threshold, config.nms_iou, config.detections_per_image
        return TorchvisionRoIHeads(None, None, None, 0.5, 0.5, 10**6, 0.25, weights, *thresholds)

    return make


@pytest.fixture(scope="session")
def image_batch() -> Callable[..., ImageBatch]:
    """`image_batch(*sizes, originals=None)`: a batch of which only the sizes (height, width) matter."""

    def make(*sizes: tuple[int, int], originals: list[tuple[int, int]] | None = None) -> ImageBatch:
        return ImageBatch(torch.zeros(len(sizes), 3, 1, 1), list(sizes), originals or list(sizes))

    return make


@pytest.fixture(scope="session")
def random_boxes() -> Callable[..., Tensor]:
    """`random_boxes(count, seed, reach=150)`: boxes (count, 4) with sides of 12 to 82 pixels."""

    def make(count: int, seed: int, reach: float = 150.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        corner, sides = torch.rand(count, 2, generator=generator), torch.rand(count, 2, generator=generator)
        return torch.cat((corner * reach, corner * reach + 12 + sides * 70), dim=1)

    return make


@pytest.fixture(scope="session")
def truth() -> Callable[..., GroundTruth]:
    """`truth(boxes, labels, difficult=None)`: the objects of an image, none of them difficult unless said."""

    def make(boxes: list[list[float]], labels: list[int], difficult: list[bool] | None = None) -> GroundTruth:
        flags = torch.tensor(difficult or [False] * len(boxes), dtype=torch.bool)
        return GroundTruth(torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.int64), flags)

    return make


@pytest.fixture
def three_objects(truth: Callable[..., GroundTruth]) -> GroundTruth:
    """Of the classes 1, 2 and 3, the first of them difficult."""
    return truth([[60, 0, 70, 10], [0, 0, 40, 20], [100, 50, 120, 90]], [1, 2, 3], [True, False, False])


@pytest.fixture
def four_proposals() -> Tensor:
    """Of the second of `three_objects` half, of the third all, of the difficult one all, and nothing of any."""
    return torch.tensor([[0.0, 0, 20, 20], [100, 50, 120, 90], [60, 0, 70, 10], [200, 200, 220, 230]])
