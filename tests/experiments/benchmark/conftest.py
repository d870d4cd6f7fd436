"""A small detector of each kind beside torchvision's with the same weights."""

from dataclasses import replace

import pytest
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN

from detector.faster_rcnn import FasterRCNN
from experiments.benchmark.measuring import CPU
from experiments.benchmark.models import Batch, Network, build_network, make_images, standard_network
from experiments.benchmark.torchvision_peer import build_peer

SIZE = (96, 160)
HUGE = 10**6
NAMES = ["vgg16", "resnet18_c4", "resnet18_fpn", "mobilenet_v2_fpn", "mobilenet_v2_c4", "mobilenet_v3_large_320_fpn"]
Pair = tuple[str, FasterRCNN, TorchvisionFasterRCNN, Batch]


def small_options(name: str) -> Network:
    """All anchors and proposals are sampled, so that nothing is random."""
    options = standard_network(name, SIZE)
    width = 64 if name.endswith("fpn") else None
    backbone = replace(options.backbone, dropout=0.0, box_head_channels=width)
    if name == "vgg16":  # without a file of half a gigabyte
        backbone = replace(backbone, weights="none", frozen_stages=0, norm="batch")
    return replace(
        options,
        backbone=backbone,
        rpn=replace(options.rpn, samples_per_image=HUGE, positive_fraction=1.0, post_nms_train=100, post_nms_test=200),
        roi=replace(options.roi, samples_per_image=HUGE, positive_fraction=1.0),
    )


@pytest.fixture(scope="module", params=NAMES)
def pair(request) -> Pair:
    """Name, ours and torchvision's, and two images."""
    options = small_options(request.param)
    batch = make_images(options.size, 2, 4, CPU)
    model, backbone = build_network(options, batch)
    return request.param, model, build_peer(model, backbone), batch
