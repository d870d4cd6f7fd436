"""The published worked example beyond matching (test_sampling.py) and objectness (test_rpn.py).

An image of 800 x 800 with two objects, stride 16, VGG16: its shapes, and an error in its source that is no convention.
"""

import torch
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig, base_anchors
from detector.backbones.base import BackboneConfig
from detector.boxes import is_inside
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RegionProposalNetwork, RPNConfig

OBJECTS = torch.tensor([[30.0, 20.0, 500.0, 400.0], [400.0, 300.0, 600.0, 500.0]])

# What the tutorial prints: positives among the inside anchors, with its locations column by column.
COLUMN_BY_COLUMN = [
    *(2262, 2508, 5620, 5628, 5636, 5644, 5866, 5874, 5882),
    *(5890, 6112, 6120, 6128, 6136, 6358, 6366, 6374, 6382),
]


def test_the_published_indices_follow_from_columns_first() -> None:
    """The tutorial lists locations column by column, while the RPN head's map is flattened row by row.

    So its labels lie at other places than its predictions. The same rule on transposed locations gives its indices.
    """
    cell = base_anchors(AnchorConfig([8, 16, 32], [0.5, 1, 2], order="ratio_major"))
    steps = torch.arange(50) * 16.0 + 8
    x, y = torch.meshgrid(steps, steps, indexing="ij")  # x slowest
    columns_first = (torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4) + cell).reshape(-1, 4)
    inside = columns_first[is_inside(columns_first, (800, 800))]
    assert len(inside) == 8940
    iou = box_iou(OBJECTS, inside)
    best = iou.max(dim=1, keepdim=True).values
    ties = ((iou - best).abs() < 1e-6).any(dim=0)
    assert torch.where(ties)[0].tolist() == COLUMN_BY_COLUMN


def test_shapes_of_vgg16() -> None:
    torch.manual_seed(0)
    anchors = AnchorConfig([8, 16, 32], [0.5, 1, 2])
    model = FasterRCNN(
        20,
        BackboneConfig("vgg16", weights="none", frozen_stages=0, dropout=0.0),
        anchors,
        RPNConfig(hidden_channels=512),
        RoIConfig(pooling="roi_pool"),
        ImageConfig([800], 800),
    ).eval()
    with torch.inference_mode():
        features = model.backbone(torch.rand(1, 3, 800, 800))
        assert [tuple(level.shape) for level in features] == [(1, 512, 50, 50)]
        softmax, sigmoid = (
            RegionProposalNetwork(512, [16], anchors, RPNConfig(objectness="softmax", hidden_channels=512)).head,
            RegionProposalNetwork(512, [16], anchors, RPNConfig(objectness="sigmoid", hidden_channels=512)).head,
        )
        for head in (model.rpn.head, softmax, sigmoid):
            logits, deltas = head(features)
            assert (tuple(logits[0].shape), tuple(deltas[0].shape)) == ((1, 22500), (1, 22500, 4))
        assert (softmax.objectness.out_channels, sigmoid.objectness.out_channels) == (18, 9)
        rois = [OBJECTS[:1].repeat(128, 1)]
        pooled = model.roi_heads.pool(features, rois)
        assert tuple(pooled.flatten(1).shape) == (128, 25088)
        scores, boxes = model.roi_heads.predictor(model.roi_heads.box_head(pooled))
        assert (tuple(scores.shape), tuple(boxes.shape)) == ((128, 21), (128, 80))
        # 84 in the tutorial: it also gives background four deltas, which no loss and no detection ever reads.
        assert boxes.shape[1] + 4 == 84
