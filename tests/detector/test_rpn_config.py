"""Options of the region proposal network: what they start with, and which are refused."""

from typing import Any

import pytest
import torch

from detector.errors import InputError
from detector.rpn import RPNConfig, RPNHead


def test_initial_weights() -> None:
    torch.manual_seed(0)
    for options, std in (({}, 0.01), ({"init_std": 0.3}, 0.3)):
        head = RPNHead(256, [9], RPNConfig(**options))
        for layer in (head.conv, head.objectness, head.deltas):
            assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.06)
            assert not layer.bias.detach().any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_iou": 0.8}, r"rpn\.negative_iou 0.8 and rpn\.positive_iou 0.7"),
        ({"positive_fraction": 0}, r"rpn\.positive_fraction: 0"),
        ({"pre_nms_test": 0}, r"rpn\.pre_nms_test: 0"),
        ({"samples_per_image": -1}, r"rpn\.samples_per_image: -1"),
        ({"objectness": "tanh"}, r"rpn\.objectness: 'tanh' is none of sigmoid, softmax"),
        ({"reg_normalizer": "anchors"}, r"rpn\.reg_normalizer: 'anchors' is none of samples, positives, samples_per_"),
        ({"best_per_object": "two"}, r"rpn\.best_per_object: 'two' is none of true, false, one"),
        ({"nms_iou": 1.5}, r"rpn\.nms_iou: 1.5 must be in \[0, 1\]"),
        ({"min_side": -1.0}, r"rpn\.min_side: -1.0 must be >= 0"),
        ({"cls_loss": "ce"}, r"rpn\.cls_loss: 'ce' is none of bce, focal"),
        ({"focal_alpha": 2}, r"rpn\.focal_alpha: 2 must be in \[0, 1\]"),
        ({"reg_loss": "l2"}, r"rpn\.reg_loss: 'l2' is none of smooth_l1, iou, giou, diou, ciou"),
        ({"cls_loss": "focal", "objectness": "softmax"}, r"rpn\.cls_loss: focal .* needs rpn\.objectness sigmoid$"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RPNConfig(**options)
