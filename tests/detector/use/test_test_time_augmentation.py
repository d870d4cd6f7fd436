"""Views of test-time augmentation by hand: sizes, mirrored boxes, one NMS over all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig, make_batch
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.use.test_time_augmentation import mirror, views

SMALL = BackboneConfig("small_c4", weights=None, frozen_stages=0, box_head_channels=32)


def image(height: int, width: int, seed: int) -> Tensor:
    """Blocks of 8 x 8 pixels in random colours."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(256, (3, -(-height // 8), -(-width // 8)), dtype=torch.uint8, generator=generator)
    return colors.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()


IMAGES = [image(64, 96, 0), image(112, 80, 1)]


def detector(roi: dict[str, Any] | None = None, **options: Any) -> FasterRCNN:
    """Random heads so strong that scores and boxes differ clearly; the same weights in every call."""
    torch.manual_seed(0)
    model = FasterRCNN(
        3,
        SMALL,
        AnchorConfig([1, 2], [0.5, 2]),
        RPNConfig(post_nms_test=25),
        RoIConfig(**{"score_threshold": 0.2, "nms_iou": 0.5} | (roi or {})),
        ImageConfig([64], 96, **options),
    )
    with torch.no_grad():
        for layer in (model.rpn.head.objectness, model.rpn.head.deltas, model.roi_heads.predictor.scores):
            layer.weight.mul_(30)
    return model.eval()


def test_given_proposals_stand_in_for_those_of_the_rpn() -> None:
    model = detector(roi={"nms_iou": 1.0})
    boxes = [
        torch.tensor([[8.0, 4.0, 40.0, 44.0], [50.0, 20.0, 90.0, 60.0]]),
        torch.tensor([[10.0, 20.0, 70.0, 100.0]]),
    ]
    with torch.no_grad():
        features, batch = model.features(IMAGES)
        of_batch = [boxes[0], boxes[1] * torch.tensor([64 / 80, 89 / 112] * 2)]  # 112 x 80 is seen as 89 x 64
        expected = model.detect(features, of_batch, batch)
        found, proposals = model(IMAGES, boxes)
    assert batch.sizes == [(64, 96), (89, 64)]
    for here, there, own, given in zip(found, expected, proposals, boxes, strict=True):
        assert len(here["scores"]) > 0
        assert torch.equal(here["scores"], there["scores"])
        assert torch.equal(here["boxes"], there["boxes"])
        torch.testing.assert_close(own, given)


def test_given_proposals_are_mirrored_with_the_image() -> None:
    """What is found from the object's box in the mirrored image alone is found in the two views as well."""
    model, both = detector(roi={"nms_iou": 1.0}), detector(roi={"nms_iou": 1.0}, test_flip=True)
    box = torch.tensor([[8.0, 4.0, 40.0, 44.0]])
    with torch.no_grad():
        (plain,), _ = model(IMAGES[:1], [box])
        (mirrored,), _ = model([IMAGES[0].flip(-1)], [torch.tensor([[56.0, 4.0, 88.0, 44.0]])])
        (found,), (own,) = both(IMAGES[:1], [box])
    torch.testing.assert_close(own, box)
    expected = torch.cat((plain["scores"], mirrored["scores"])).sort(descending=True).values
    assert len(mirrored["scores"]) > 0
    torch.testing.assert_close(found["scores"], expected)


def test_an_image_without_given_proposals_has_no_detections() -> None:
    with torch.no_grad():
        found, _ = detector()(IMAGES, [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert [len(one["boxes"]) for one in found] == [0, 0]


def test_sizes_of_views() -> None:
    config = ImageConfig([480, 600], 1000, test_flip=True, test_shortest_sides=[300, 600, 1200])
    seen = [(view.image.shortest_side, view.image.longest_side, view.mirrored) for view in views(config)]
    assert seen == [
        *(([300], 500, False), ([300], 500, True), ([600], 1000, False)),
        *(([600], 1000, True), ([1200], 2000, False), ([1200], 2000, True)),
    ]
    sizes = [
        make_batch([image(100, 150, 0), image(60, 200, 0)], view.image, False).sizes for view in views(config)[::2]
    ]
    assert sizes == [[(300, 450), (150, 500)], [(600, 900), (300, 1000)], [(1200, 1800), (600, 2000)]]
    (only,) = views(ImageConfig([480, 600], 1000))
    assert (only.image.shortest_side, only.image.longest_side, only.mirrored) == ([600], 1000, False)
    assert [view.mirrored for view in views(ImageConfig([600], 1000, test_flip=True))] == [False, True]


def test_mirrored_boxes() -> None:
    boxes = torch.tensor([[0.0, 1.0, 30.0, 5.0], [90.0, 2.0, 100.0, 9.0]])
    assert mirror(boxes, 100).tolist() == [[70, 1, 100, 5], [0, 2, 10, 9]]
    assert torch.equal(mirror(mirror(boxes, 100), 100), boxes)


def test_one_view_of_the_usual_size_changes_nothing() -> None:
    (plain, proposals), (viewed, same) = detector()(IMAGES), detector(test_shortest_sides=[64])(IMAGES)
    for one, other in zip(plain, viewed, strict=True):
        assert len(one["boxes"]) > 3
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["boxes"], other["boxes"])
        torch.testing.assert_close(one["scores"], other["scores"])
    for one, other in zip(proposals, same, strict=True):
        torch.testing.assert_close(one, other)


def test_mirrored_images_give_mirrored_detections() -> None:
    """With both views of each, an image and its mirror image see the same."""
    model = detector(test_flip=True, roi={"detections_per_image": 1000})
    seen, _ = model(IMAGES)
    mirrored, _ = model([each.flip(-1) for each in IMAGES])
    plain, _ = detector(roi={"detections_per_image": 1000})(IMAGES)
    for index, (one, other) in enumerate(zip(seen, mirrored, strict=True)):
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-5, rtol=1e-4)
        back = mirror(other["boxes"], IMAGES[index].shape[2])
        torch.testing.assert_close(one["boxes"], back, atol=0.01, rtol=1e-4)
        assert torch.equal(one["labels"], other["labels"])
        assert not torch.equal(one["scores"], plain[index]["scores"])


@pytest.mark.parametrize("options", [{"test_shortest_sides": [48, 64]}, {"test_flip": True}])
@pytest.mark.parametrize("nms", ["hard", "soft_linear"])
def test_views_meet_in_one_nms(options: dict[str, Any], nms: str) -> None:
    """Without suppression, all candidates of each view by itself; with it, what it leaves of their union."""
    roi = {"nms": nms, "detections_per_image": 1000}
    everything, proposals = detector(roi | {"nms": "hard", "nms_iou": 1.0}, **options)(IMAGES)
    alone = []
    for side, flipped in ((64, False), (64, True)) if "test_flip" in options else ((48, False), (64, False)):
        model = detector(roi | {"nms": "hard", "nms_iou": 1.0}, test_shortest_sides=[side])
        found, first = model([each.flip(-1) if flipped else each for each in IMAGES])
        alone.append((found, first))
    merged, _ = detector(roi, **options)(IMAGES)
    for index, each in enumerate(everything):
        scores = torch.cat([found[index]["scores"] for found, _ in alone])
        torch.testing.assert_close(each["scores"], scores.sort(descending=True).values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(proposals[index], alone[0][1][index])
        assert 0 < len(merged[index]["scores"]) < len(scores)
        assert float(merged[index]["scores"][0]) == pytest.approx(float(scores.max()), rel=1e-4)


def test_training_mode_takes_no_views() -> None:
    model = detector(test_flip=True, test_shortest_sides=[64, 80])
    seen: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    with torch.no_grad():
        model(IMAGES[:1])
        model.train()(IMAGES[:1])
    assert seen == [(64, 96), (64, 96), (96, 128), (96, 128), (64, 96)]
