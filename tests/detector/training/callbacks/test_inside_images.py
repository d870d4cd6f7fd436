"""Pictures of anchors, proposals and RoIs: which boxes are drawn where, and in which colours."""

from typing import Any

import torch
from torch import Tensor

from detector.image_batch import ImageBatch
from detector.sampling import IGNORED, NEGATIVE, POSITIVE, Matches, SampledRoIs
from detector.step_record import Proposals, StepRecord
from detector.training.callbacks.inside_images import draw_anchors, draw_proposals, draw_rois
from detector.use.drawing import GROUND_TRUTH_COLOR, class_color, palette_color

IMAGE = torch.zeros(3, 300, 400, dtype=torch.uint8)
GREY, GREEN, ORANGE, BLACK = (150, 150, 150), (0, 210, 120), (255, 150, 0), (0, 0, 0)
TARGET: dict[str, Any] = {
    "boxes": torch.tensor([[20.0, 40, 120, 140], [240, 40, 340, 140]]),
    "labels": torch.tensor([1, 2]),
    "difficult": torch.tensor([False, False]),
}
# The network sees half of the image's size.
HALF = ImageBatch(torch.zeros(1, 3, 150, 200), [(150, 200)], [(300, 400)])
BOXES = torch.tensor([[30.0, 50, 130, 150], [250, 60, 350, 160], [160, 180, 220, 240], [300, 200, 380, 280]])


def colors(picture: Tensor, boxes: Tensor) -> list[tuple[int, ...]]:
    """Colours of the left edges, ten pixels above the lower corner."""
    return [tuple(picture[:, y2 - 10, x1].tolist()) for x1, _, _, y2 in boxes.long().tolist()]


def test_positive_anchors_have_the_colours_of_their_objects() -> None:
    kind, owner = torch.tensor([POSITIVE, POSITIVE, NEGATIVE, IGNORED]), torch.tensor([0, 1, 1, 0])
    matches = Matches(kind, owner, torch.tensor([0.8, 0.4, 0.1, 0.5]))
    learned = StepRecord(batch=HALF, level_anchors=[BOXES / 2], anchor_matches=[matches])
    picture = draw_anchors(IMAGE, TARGET, learned, ["cat", "dog"], 0.7)
    assert colors(picture, BOXES[[0, 2, 3]]) == [palette_color(0), BLACK, BLACK]
    assert colors(picture, TARGET["boxes"]) == [palette_color(0), palette_color(1)]
    edge = (picture[:, 62:158, 250] == torch.tensor(palette_color(1))[:, None]).all(dim=0)
    assert 30 < int(edge.sum()) < 66  # the second is so only as the best of its object: dashed
    other = draw_anchors(IMAGE, TARGET, learned, ["cat", "dog"], 0.0)
    assert colors(other, BOXES[:2]) == [palette_color(0), palette_color(1)]
    edge = (other[:, 62:158, 250] == torch.tensor(palette_color(1))[:, None]).all(dim=0)
    assert edge.all()  # by another rule: not dashed


def test_proposals_before_nms_lie_below_those_after() -> None:
    found = Proposals(BOXES / 2, torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.arange(4), torch.tensor([0, 2]))
    picture = draw_proposals(IMAGE, TARGET, StepRecord(batch=HALF, proposals=[found]), 0)
    assert colors(picture, BOXES) == [GREEN, GREY, ORANGE, GREY]  # the first has an IoU of 81 / 119 with an object
    assert colors(picture, TARGET["boxes"]) == [GROUND_TRUTH_COLOR] * 2


def test_rois_have_the_colours_of_their_labels() -> None:
    sampled = SampledRoIs(BOXES[:3] / 2, torch.tensor([1, 2, 0]), torch.zeros(3, 4), torch.arange(3))
    learned = StepRecord(batch=HALF, sampled_rois=[sampled], roi_candidates=[BOXES / 2])
    picture = draw_rois(IMAGE, TARGET, learned, ["cat", "dog"])
    assert colors(picture, BOXES) == [class_color("cat"), class_color("dog"), GREY, BLACK]
