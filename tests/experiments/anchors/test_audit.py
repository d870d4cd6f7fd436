"""The audit of anchors: numbers by hand and by brute force, and VOC2007."""

import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from datamodules.ground_truth import SplitTruth, read_ground_truth
from datamodules.voc.reader import VOCFormat
from detector.anchors import AnchorConfig
from detector.image_batch import ImageConfig
from detector.rpn import RPNConfig
from experiments.anchors.audit import AuditResult, audit

TALL = AnchorConfig(scales=[2], aspect_ratios=[4], straddling="drop")  # 16 wide, 64 high
AS_THEY_ARE = ImageConfig(shortest_side=[50], longest_side=1000)
SIZES = np.array([[100, 50], [50, 100]])  # (height, width)
NONE = np.zeros((0, 4), np.float32)


def audited(
    boxes: Any, image: Any, config: AnchorConfig = TALL, images: ImageConfig = AS_THEY_ARE, **options: Any
) -> AuditResult:
    return audit(config, [16], images, SIZES, np.array(boxes, np.float32), np.array(image, int), **options)


def test_one_anchor_by_hand() -> None:
    # See the tests of experiments.anchors.coverage for the geometry: 6 of 28 locations are legal in the first image and
    # none of 28 in the second. IoUs: 720 / 1024; 240 / 1024 at two anchors; 0, for lack of any anchor.
    result = audited([[10, 10, 20, 40], [18, 10, 30, 70], [20, 30, 28, 60]], [1, 0, 0])
    assert (result.images, result.objects) == (2, 3)
    assert result.mean_best_iou == pytest.approx(960 / 1024 / 3)
    assert result.share_iou_50 == result.share_iou_70 == pytest.approx(1 / 3)
    assert result.share_rescued == result.share_without_anchor == result.share_without_positive == pytest.approx(1 / 3)
    # Two positives of the second object are (16, 8, 32, 72), which is the first one's, too, and the row below.
    assert result.positives_per_image == 1
    assert result.share_images_wanted == 0
    (anchor,) = result.anchors
    assert (anchor.level, anchor.stride, anchor.scale, anchor.aspect_ratio) == (0, 16, 2, 4)
    assert (anchor.width, anchor.height) == (16, 64)
    assert anchor.legal_share == pytest.approx(6 / 56)
    assert anchor.images_without == 1
    assert anchor.best_match_share == pytest.approx(2 / 3)
    assert anchor.positive_share == 1


def test_kept_straddling_anchors_are_used_but_not_legal() -> None:
    kept = AnchorConfig(scales=[2], aspect_ratios=[4], straddling="keep")
    # In the second image the anchor (0, -8, 16, 56) covers 6 x 30 of (10, 10, 20, 40), and so does its right neighbour
    # (16, -8, 32, 56) with 4 x 30.
    result = audited([[10, 10, 20, 40]], [1], kept)
    assert result.mean_best_iou == pytest.approx(180 / (1024 + 300 - 180))
    assert result.share_without_anchor == 0
    assert result.anchors[0].legal_share == pytest.approx(6 / 56)
    assert result.anchors[0].images_without == 1
    assert result.warnings == [
        "100.0 % of objects have positive anchors only because their best ones count, at an IoU below 0.7",
        "100.0 % of objects overlap no anchor by an IoU of 0.5",
    ]


def test_shapes_that_tie_share_an_object() -> None:
    # Both anchors, 16 x 64 and 64 x 16, hold the object wholly at some location and have the same area.
    config = AnchorConfig(scales=[2], aspect_ratios=[4, 0.25], straddling="keep")
    result = audited([[18, 34, 28, 44]], [0], config)
    assert [anchor.best_match_share for anchor in result.anchors] == [0.5, 0.5]


def test_boxes_and_images_are_resized() -> None:
    # Twice as large: 200 x 100 and 100 x 200 pixels, where 100 limits the shorter side.
    double = ImageConfig(shortest_side=[100], longest_side=1000)
    result = audited([[9, 5, 15, 35]], [0], images=double)
    assert result.mean_best_iou == 720 / 1024
    # Columns 0 to 5 of 7 and rows 2 to 10 of 13; columns 0 to 11 of 13 and rows 2 and 3 of 7.
    assert result.anchors[0].legal_share == pytest.approx((6 * 9 + 12 * 2) / (2 * 7 * 13))
    assert result.by_size["medium"].objects == 0
    assert result.by_size["small"].objects == 1  # 12 x 60 pixels
    assert result.by_original_size["small"].objects == 1
    limited = ImageConfig(shortest_side=[100], longest_side=100)
    assert audited([[18, 10, 30, 70]], [0], images=limited).mean_best_iou == 720 / 1024  # back to the size it has


def test_an_object_on_the_border_of_two_sizes_is_of_the_larger() -> None:
    result = audited([[0, 0, 32, 32], [0, 0, 31, 33]], [0, 0])
    assert [result.by_size[name].objects for name in ("small", "medium", "large")] == [1, 1, 0]


def test_several_training_sizes_have_equal_parts() -> None:
    boxes, image = [[18, 10, 30, 70]], [0]
    both = audited(boxes, image, images=ImageConfig(shortest_side=[50, 100], longest_side=1000))
    parts = [audited(boxes, image, images=ImageConfig(shortest_side=[s], longest_side=1000)) for s in (50, 100)]
    assert both.objects == 1
    assert both.mean_best_iou == pytest.approx(np.mean([part.mean_best_iou for part in parts]))
    assert parts[0].mean_best_iou != parts[1].mean_best_iou
    assert both.positives_per_image == pytest.approx(np.mean([part.positives_per_image for part in parts]))
    assert [part.anchors[0].images_without for part in parts] == [1, 0]
    assert both.anchors[0].images_without == 0  # legal at one of the sizes
    assert [both.by_size[name].objects for name in ("small", "medium", "large")] == [0.5, 0.5, 0]


def test_groups() -> None:
    boxes = [[0, 0, 10, 40], [0, 0, 40, 10], [5, 5, 45, 50], [0, 0, 30, 30]]
    result = audited(boxes, [0, 0, 0, 1], labels=np.array([1, 3, 3, 1]), class_names=("cat", "emu", "dog"))
    assert {name: group.objects for name, group in result.by_class.items()} == {"cat": 2, "dog": 2}
    assert [group.objects for group in result.by_original_size.values()] == [3, 1, 0]
    groups = {name: group.objects for name, group in result.by_aspect_ratio.items()}
    assert groups == {"below 0.35": 1, "0.35 to 0.71": 0, "0.71 to 1.41": 2, "1.41 to 2.83": 0, "from 2.83": 1}
    assert result.by_class["cat"].share_without_anchor == 0.5


def test_rules_of_the_rpn_are_respected() -> None:
    boxes, image = [[18, 10, 30, 70], [20, 30, 28, 60]], [0, 0]
    strict = audited(boxes, image, rpn=RPNConfig(positive_iou=0.75))
    assert (strict.share_rescued, strict.share_without_positive) == (1, 0)
    no_rescue = audited(boxes, image, rpn=RPNConfig(positive_iou=0.75, best_per_object=False))
    assert (no_rescue.share_rescued, no_rescue.share_without_positive, no_rescue.positives_per_image) == (0, 1, 0)
    few = audited(boxes, image, rpn=RPNConfig(samples_per_image=4, positive_fraction=0.25))
    assert (few.wanted_positives, few.sampled_positives_per_image, few.share_images_wanted) == (1, 0.5, 0.5)
    assert few.positives_per_image == 1


def test_without_objects_all_is_json() -> None:
    result = audited(NONE, [])
    assert math.isnan(result.mean_best_iou)
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (document["images"], document["objects"], document["mean_best_iou"]) == (2, 0, None)
    assert document["anchors"][0]["best_match_share"] is None
    assert document["positives_per_image"] == 0


def test_warnings_name_dead_anchors() -> None:
    config = AnchorConfig(scales=[2, 8], aspect_ratios=[4], straddling="drop")  # 16 x 64 and 64 x 256 pixels
    lines = audited([[18, 10, 30, 70]], [0], config).warnings
    assert lines == [
        "nearly dead anchor: scale 2, ratio 4 (16 x 64 pixels, stride 16) is inside the image at 10.7 % of locations, "
        "at none in 1 of 2 images",
        "dead anchor: scale 8, ratio 4 (64 x 256 pixels, stride 16) fits into no image, so it is never trained",
    ]
    kept = AnchorConfig(scales=[2, 8], aspect_ratios=[4], straddling="keep")
    assert audited([[18, 10, 30, 70]], [0], kept).warnings == [
        "dead anchor: scale 8, ratio 4 (64 x 256 pixels, stride 16) is positive for no object, so it only learns "
        "background"
    ]


# ---- an independent count ----


def brute_force(
    sides: list[list[float]],  # of each level
    ratios: list[float],
    strides: list[int],
    sizes: list[tuple[int, int]],  # after resizing
    boxes: list[np.ndarray],
    drop: bool,
) -> dict[str, Any]:
    """Every anchor of every image, written down from the paper in float64."""
    best, positives, wins = [], [], defaultdict(float)
    inside, locations, without = defaultdict(int), defaultdict(int), defaultdict(int)
    for (height, width), objects in zip(sizes, boxes, strict=True):
        rows = []
        for level, stride in enumerate(strides):
            for side in sides[level]:
                for ratio in ratios:
                    w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                    key, legal = (level, side, ratio), 0
                    for row in range(math.ceil(height / stride)):
                        for column in range(math.ceil(width / stride)):
                            x, y = (column + 0.5) * stride, (row + 0.5) * stride
                            fits = x - w / 2 >= 0 and y - h / 2 >= 0 and x + w / 2 <= width and y + h / 2 <= height
                            legal += fits
                            locations[key] += 1
                            if fits or not drop:
                                rows.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2, key))
                    inside[key] += legal
                    without[key] += legal == 0
        if not len(objects):
            positives.append(0)
            continue
        anchors = np.array([row[:4] for row in rows]).reshape(-1, 4)
        low = np.maximum(objects[:, None, :2], anchors[None, :, :2])
        high = np.minimum(objects[:, None, 2:], anchors[None, :, 2:])
        inter = np.clip(high - low, 0, None).prod(axis=2)
        area = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (objects, anchors)]
        iou = inter / (area[0][:, None] + area[1][None] - inter)
        highest = iou.max(axis=1, initial=0)
        best += highest.tolist()
        tied = (iou >= highest[:, None] * (1 - 1e-5)) & (iou > 0)
        positives.append(int(((iou >= 0.7) | tied).any(axis=0).sum()))
        for one in tied:
            keys = {rows[index][4] for index in np.flatnonzero(one)}
            for key in keys:
                wins[key] += 1 / len(keys)
    return {
        "best": np.array(best),
        "positives": positives,
        "shapes": {key: (inside[key], locations[key], without[key], wins[key] / len(best)) for key in locations},
    }


def check_against_brute_force(result: AuditResult, expected: dict[str, Any], base_size: float) -> None:
    best = expected["best"]
    assert result.objects == len(best)
    assert result.mean_best_iou == pytest.approx(best.mean(), rel=1e-6)
    assert result.share_iou_50 == (best >= 0.5).mean()
    assert result.share_iou_70 == (best >= 0.7).mean()
    assert result.share_rescued == ((best < 0.7) & (best > 0)).mean()
    assert result.share_without_anchor == (best == 0).mean()
    assert result.positives_per_image == np.mean(expected["positives"])
    assert result.sampled_positives_per_image == np.minimum(expected["positives"], 128).mean()
    assert len(result.anchors) == len(expected["shapes"])
    for anchor in result.anchors:
        legal, locations, without, wins = expected["shapes"][
            anchor.level, anchor.scale * base_size, anchor.aspect_ratio
        ]
        assert anchor.legal_share == legal / locations
        assert anchor.images_without == without
        assert anchor.best_match_share == pytest.approx(wins)


@pytest.mark.parametrize("straddling", ["drop", "keep"])
def test_levels_with_scales_of_their_own(straddling: Any) -> None:
    """Three levels, asymmetric ratios, an image without objects, and boxes beyond the reach of small levels."""
    config = AnchorConfig(scales=[[20], [45], [90]], aspect_ratios=[0.6, 3], base_size=1, straddling=straddling)
    rng = np.random.default_rng(4)
    sizes = [(90, 140), (70, 61), (120, 100)]
    corners = rng.uniform(0, 40, (9, 2))
    boxes = np.concatenate((corners, corners + rng.uniform(4, 30, (9, 2)).round()), axis=1).astype(np.float32)
    image = np.repeat([0, 2], [6, 3])
    images = ImageConfig(shortest_side=[40], longest_side=1000)
    resized = [(40, 62), (45, 40), (48, 40)]
    result = audit(config, [8, 16, 32], images, np.array(sizes), boxes, image)
    scaled = [
        boxes[image == i] * np.tile([new[1] / old[1], new[0] / old[0]], 2)
        for i, (old, new) in enumerate(zip(sizes, resized, strict=True))
    ]
    expected = brute_force([[20], [45], [90]], [0.6, 3], [8, 16, 32], resized, scaled, straddling == "drop")
    check_against_brute_force(result, expected, 1)
    assert [anchor.level for anchor in result.anchors] == [0, 0, 1, 1, 2, 2]


# ---- VOC2007 ----


@pytest.fixture(scope="module")
def voc2007(genuine_voc: Any) -> SplitTruth:
    return read_ground_truth(VOCFormat(genuine_voc("voc2007-annotations.tar.xz")), ["2007_trainval"])


@pytest.mark.real_data
def test_the_papers_anchors_on_voc2007(voc2007: SplitTruth) -> None:
    """Shortest side 600, longest 1000, stride 16, scales 8, 16, 32, straddlers dropped."""
    objects = voc2007.objects
    easy = ~objects.difficult
    result = audit(
        AnchorConfig(), [16], ImageConfig(), voc2007.sizes, objects.box[easy], objects.image_id[easy], rpn=RPNConfig()
    )
    assert (result.images, result.objects) == (5011, 12608)
    tall = next(anchor for anchor in result.anchors if (anchor.scale, anchor.aspect_ratio) == (32, 2))
    assert (round(tall.width), round(tall.height)) == (362, 724)
    assert 0.005 < tall.legal_share < 0.015
    (nearly_dead,) = [line for line in result.warnings if "scale 32, ratio 2 " in line]
    assert f"{tall.images_without} of 5011 images" in nearly_dead
    # Only an image at least 724 pixels high holds it.
    resized_heights = np.array([int(h * min(600 / min(h, w), 1000 / max(h, w))) for h, w in voc2007.sizes.tolist()])
    assert tall.images_without >= (resized_heights < 724).sum() > 4000
    assert sum(anchor.best_match_share for anchor in result.anchors) == pytest.approx(1 - result.share_without_anchor)
    assert result.share_rescued + result.share_iou_70 + result.share_without_anchor == pytest.approx(1)


@pytest.mark.real_data
@pytest.mark.parametrize("straddling", ["drop", "keep"])
def test_brute_force_on_a_sample_of_voc2007(voc2007: SplitTruth, straddling: Any) -> None:
    chosen = np.arange(17, 5011, 250)
    objects = voc2007.objects
    rows = [np.flatnonzero((objects.image_id == i) & ~objects.difficult) for i in chosen]
    sizes = voc2007.sizes[chosen]
    result = audit(
        AnchorConfig(straddling=straddling),
        [16],
        ImageConfig(),
        sizes,
        objects.box[np.concatenate(rows)],
        np.repeat(np.arange(len(chosen)), [len(r) for r in rows]),
    )
    resized, boxes = [], []
    for (height, width), own in zip(sizes.tolist(), rows, strict=True):
        scale = min(600 / min(height, width), 1000 / max(height, width))
        new = int(height * scale), int(width * scale)
        resized.append(new)
        boxes.append(objects.box[own] * np.tile([new[1] / width, new[0] / height], 2))
    expected = brute_force([[128, 256, 512]], [0.5, 1, 2], [16], resized, boxes, straddling == "drop")
    check_against_brute_force(result, expected, 16)
    assert len(expected["best"]) > 25
