"""The RPN's head: outputs in the order of the anchors, levels that share layers or have their own, its depth."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from detector.anchors import AnchorConfig
from detector.rpn import RPNConfig, RPNHead
from tests.detector.test_rpn import LN2, image_batch, network


@pytest.mark.parametrize("objectness", ["sigmoid", "softmax"])
@pytest.mark.parametrize("anchor", [0, 4])
def test_outputs_are_flattened_in_the_anchors_order(objectness: str, anchor: int) -> None:
    """A feature at row 2, column 1 of a 3 x 5 map raises one anchor there, and only that one is moved."""
    rpn = network(AnchorConfig([1, 2, 4], [0.25, 4]), objectness=objectness).eval()
    for layer in (rpn.head.conv, rpn.head.objectness, rpn.head.deltas):
        torch.nn.init.zeros_(layer.weight)
    deltas = torch.tensor([0.5, -0.25, LN2, -LN2])
    with torch.no_grad():
        rpn.head.conv.weight[0, 0, 1, 1] = 1
        rpn.head.objectness.weight[2 * anchor + 1 if objectness == "softmax" else anchor, 0] = 3
        rpn.head.deltas.weight[4 * anchor : 4 * anchor + 4, 0, 0, 0] = deltas
    features = torch.zeros(2, 6, 3, 5)
    features[1, 0, 2, 1] = 1
    output = rpn([features])
    place = (2 * 5 + 1) * 6 + anchor
    logits = torch.zeros(2, 90)
    logits[1, place] = 3
    torch.testing.assert_close(output.logits[0], logits)
    assert output.deltas[0].abs().sum(dim=2).nonzero().tolist() == [[1, place]]
    torch.testing.assert_close(output.deltas[0][1, place], deltas)
    # That anchor lies around (24, 40); the best proposal of the second image is what the deltas make of it.
    width, height = [(32, 8), (64, 16), (128, 32), (8, 32), (16, 64), (32, 128)][anchor]
    assert output.anchors[0][place].tolist() == [24 - width / 2, 40 - height / 2, 24 + width / 2, 40 + height / 2]
    x, y = 24 + 0.5 * width, 40 - 0.25 * height
    expected = torch.tensor([x - width, y - height / 4, x + width, y + height / 4]).clamp(min=0)
    torch.testing.assert_close(rpn.proposals(output, image_batch((500, 500), (500, 500)))[1][0], expected)


def test_softmax_over_background_and_object_is_the_sigmoid_of_their_difference() -> None:
    head = RPNHead(6, [3], RPNConfig(objectness="softmax"))
    torch.nn.init.normal_(head.objectness.weight)
    features = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    logits = head([features])[0][0]
    scores = head.objectness(torch.relu(head.conv(features)))  # (2, 3 * 2, 4, 5)
    pairs = scores.reshape(2, 3, 2, 4, 5).permute(0, 3, 4, 1, 2).reshape(2, 60, 2)  # background, object
    torch.testing.assert_close(logits.sigmoid(), pairs.softmax(dim=2)[..., 1])
    labels = torch.arange(120).view(2, 60) % 2
    ours = F.binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(ours, F.cross_entropy(pairs.flatten(0, 1), labels.flatten()))


def test_levels_share_the_head_and_keep_their_order() -> None:
    rpn = network(AnchorConfig([[1], [4]], [0.5, 2]), strides=(8, 32))
    fine, coarse = torch.randn(1, 6, 4, 6), torch.randn(1, 6, 1, 2)
    output = rpn([fine, coarse])
    assert [level.shape for level in output.logits] == [(1, 48), (1, 4)]
    assert [level.shape for level in output.deltas] == [(1, 48, 4), (1, 4, 4)]
    torch.testing.assert_close(output.logits[1], rpn.head([coarse])[0][0])
    sides = [(level[0, 2:] - level[0, :2]).prod().sqrt() for level in output.anchors]
    torch.testing.assert_close(torch.stack(sides), torch.tensor([16.0, 64.0]))


@pytest.mark.parametrize("objectness", ["sigmoid", "softmax"])
@pytest.mark.parametrize("at_once", [False, True], ids=["level by level", "at once"])
def test_levels_with_equally_many_anchors_share_outputs(
    objectness: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels of 1, 2, 1 anchors: the first and the last are computed by one head, that in the middle by another."""
    monkeypatch.setattr("detector.rpn.one_by_one", lambda _: not at_once)
    torch.manual_seed(0)
    options: dict[str, Any] = {"objectness": objectness, "init_std": 0.5}
    rpn = network(AnchorConfig([[1], [2, 3], [4]], [1]), (8, 16, 32), **options)
    per_anchor = 1 if objectness == "sigmoid" else 2
    shapes = {name: list(tensor.shape) for name, tensor in rpn.head.state_dict().items() if "weight" in name}
    assert shapes == {
        "conv.weight": [6, 6, 3, 3],
        "objectness.1.weight": [per_anchor, 6, 1, 1],
        "objectness.2.weight": [2 * per_anchor, 6, 1, 1],
        "deltas.1.weight": [4, 6, 1, 1],
        "deltas.2.weight": [8, 6, 1, 1],
    }
    features = [torch.randn(2, 6, *size) for size in ((3, 4), (2, 3), (1, 2))]
    output = rpn(features)
    assert [tuple(level.shape) for level in output.deltas] == [(2, 12, 4), (2, 12, 4), (2, 2, 4)]
    for number, levels in ((1, [0, 2]), (2, [1])):
        alone = RPNHead(6, [number], RPNConfig(**options))  # of equally many anchors on all levels
        state = {name.replace(f".{number}.", "."): tensor for name, tensor in rpn.head.state_dict().items()}
        alone.load_state_dict({name: tensor for name, tensor in state.items() if name in alone.state_dict()})
        logits, deltas = alone([features[level] for level in levels])
        for place, level in enumerate(levels):
            torch.testing.assert_close(output.logits[level], logits[place])
            torch.testing.assert_close(output.deltas[level], deltas[place])
    assert [len(level) for level in output.anchors] == [12, 12, 2]
    assert len(rpn.proposals(output, image_batch((24, 32), (24, 32)))) == 2


# Proposals


def test_depth_of_the_head() -> None:
    head = RPNHead(6, [2], RPNConfig(conv_depth=3, hidden_channels=4)).eval()
    assert [tuple(layer.weight.shape[:2]) for layer in (head.conv, *head.deeper)] == [(4, 6), (4, 4), (4, 4)]
    features = torch.randn(1, 6, 3, 5)
    for layer in (head.conv, *head.deeper):
        torch.nn.init.normal_(layer.bias)
    hidden = features
    for layer in (head.conv, *head.deeper):
        hidden = F.relu(layer(hidden))
    torch.testing.assert_close(head([features])[0][0], head.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
    assert len(RPNHead(6, [2], RPNConfig()).state_dict()) == 6
