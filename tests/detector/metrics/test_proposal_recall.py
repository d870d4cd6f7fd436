import math

import numpy as np
import pytest
import torch
from torch import Tensor

from detector.errors import InputError
from detector.metrics import ProposalRecall
from detector.metrics.proposal_recall import reachable


def target(
    image_id: int, boxes: list[list[float]], labels: list[int], difficult: list[bool] | None = None
) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": torch.tensor(image_id),
    }


def proposals_of(boxes: list[list[float]]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def values_of(metric: ProposalRecall) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_recall_grows_with_the_number_of_proposals() -> None:
    metric = ProposalRecall(["cat"], top_k=(1, 2, 3))
    truth = target(0, [[0, 0, 10, 10], [100, 100, 110, 120]], [1, 1])
    # IoU 0.8 with the first object, nothing, IoU 1 with the second
    found = proposals_of([[0, 0, 10, 8], [50, 50, 60, 60], [100, 100, 110, 120]])
    metric.update([found], [truth])
    got = values_of(metric)
    assert [got[f"proposal_recall@{k}"] for k in (1, 2, 3)] == [0.5, 0.5, 1.0]
    # IoU 0.8 reaches 7 of the 10 thresholds
    assert got["proposal_AR@1"] == pytest.approx(0.35)
    assert got["proposal_AR@3"] == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("height", "reached"), [(10, 1), (11, 2), (12, 3), (13, 4), (14, 5), (15, 6), (17, 8), (19, 10)]
)
def test_iou_of_exactly_a_threshold_reaches_it(height: int, reached: int) -> None:
    metric = ProposalRecall(["cat"], top_k=(5,))
    metric.update([proposals_of([[3, 3, 23, 3 + height]])], [target(0, [[3, 3, 23, 23]], [1])])
    assert values_of(metric)["proposal_AR@5"] == pytest.approx(reached / 10)


def test_one_proposal_may_cover_two_objects() -> None:
    metric = ProposalRecall(["cat"], top_k=(10,))
    metric.update([proposals_of([[0, 0, 10, 10]])], [target(0, [[0, 0, 10, 10], [0, 0, 10, 9]], [1, 1])])
    assert values_of(metric)["proposal_recall@10"] == 1.0


def test_difficult_objects_do_not_count() -> None:
    metric = ProposalRecall(["cat"], top_k=(10,))
    truth = target(0, [[0, 0, 10, 10], [50, 50, 90, 90]], [1, 1], [False, True])
    metric.update([proposals_of([[0, 0, 10, 10]])], [truth])
    assert values_of(metric)["proposal_recall@10"] == 1.0


def test_sizes_are_coco_areas_and_need_300_proposals() -> None:
    metric = ProposalRecall(["cat"], top_k=(1, 300, 500))
    boxes: list[list[float]] = [[0, 0, 20, 20], [100, 0, 150, 50], [200, 200, 400, 400], [0, 300, 32, 332]]
    # the small and the large one are found exactly; the one of 32 x 32 on the border is found and counts on both sides
    metric.update([proposals_of([boxes[2], boxes[0], boxes[3]])], [target(0, boxes, [1] * 4)])
    got = values_of(metric)
    assert got["proposal_AR@300_small"] == 1.0
    assert got["proposal_AR@300_medium"] == 0.5
    assert got["proposal_AR@300_large"] == 1.0
    assert got["proposal_recall@1"] == 0.25
    assert [name for name in got if "small" in name] == ["proposal_AR@300_small"]
    metric.reset()
    metric.update([proposals_of([boxes[3]])], [target(0, boxes, [1] * 4)])
    assert [values_of(metric)[f"proposal_AR@300_{size}"] for size in ("small", "medium", "large")] == [0.5, 0.5, 0.0]


def test_default_names() -> None:
    metric = ProposalRecall(["cat"])
    metric.update([proposals_of([])], [target(0, [[0, 0, 9, 9]], [1])])
    expected = {f"proposal_{kind}@{k}" for kind in ("recall", "AR") for k in (50, 100, 300, 1000, 2000)}
    values = metric.compute()
    assert set(values) == expected | {f"proposal_AR@300_{size}" for size in ("small", "medium", "large")}
    assert all(value.shape == () and value.dtype == torch.float32 for value in values.values())


def test_per_class_and_curve() -> None:
    metric = ProposalRecall(["cat", "dog", "cow"], top_k=(1, 2))
    truth = target(0, [[0, 0, 10, 10], [100, 0, 120, 20], [200, 0, 220, 20]], [1, 2, 2])
    metric.update([proposals_of([[0, 0, 10, 6], [100, 0, 120, 20]])], [truth])
    metric.compute()
    per_class = metric.recall_per_class()
    assert (per_class["cat"], per_class["dog"]) == (1.0, 0.5)
    assert math.isnan(per_class["cow"])
    assert metric.recall_per_class(1)["dog"] == 0.0
    np.testing.assert_allclose(metric.recall_by_size(2)["all"], [2 / 3] * 3 + [1 / 3] * 7)  # IoUs 0.6, 1 and 0
    with pytest.raises(InputError, match=r"recall with 7 proposals was not asked for; top_k is \[1, 2\]"):
        metric.recall_by_size(7)


def test_recall_by_size_and_threshold() -> None:
    metric = ProposalRecall(["cat"], top_k=(4,))
    # areas 100, 2500, 2500 and 40,000, best IoU 0.8, 1, 0.5 and 0
    boxes: list[list[float]] = [[0, 0, 10, 10], [100, 0, 150, 50], [200, 0, 250, 50], [0, 200, 200, 400]]
    metric.update(
        [proposals_of([[0, 0, 10, 8], boxes[1], [200, 0, 250, 25], [900, 900, 950, 950]])], [target(0, boxes, [1] * 4)]
    )
    values = values_of(metric)
    found = metric.recall_by_size()
    assert list(found) == ["all", "small", "medium", "large"]
    np.testing.assert_allclose(found["all"], [3 / 4] + [1 / 2] * 6 + [1 / 4] * 3)
    np.testing.assert_allclose(found["small"], [1] * 7 + [0] * 3)
    np.testing.assert_allclose(found["medium"], [1] + [1 / 2] * 9)
    np.testing.assert_allclose(found["large"], [0] * 10)
    assert values["proposal_AR@4_medium"] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("most", "numbers"),
    [
        (0, [1]),
        (30, [30]),
        (50, [50]),
        (150, [50, 100, 150]),
        (300, [50, 100, 300]),
        (1000, [50, 100, 300, 1000]),
        (5000, [50, 100, 300, 1000, 2000]),
    ],
)
def test_only_numbers_of_proposals_that_there_can_be(most: int, numbers: list[int]) -> None:
    assert reachable(most) == numbers


def test_no_proposals_is_zero_and_no_objects_is_nan() -> None:
    metric = ProposalRecall(["cat"], top_k=(300,))
    metric.update([proposals_of([])], [target(0, [[0, 0, 9, 9]], [1])])
    got = values_of(metric)
    assert (got["proposal_recall@300"], got["proposal_AR@300"]) == (0.0, 0.0)
    metric.reset()
    metric.update([proposals_of([[0, 0, 9, 9]])], [target(0, [], [])])
    assert all(math.isnan(value) for value in values_of(metric).values())
    metric.reset()
    metric.update([], [])
    assert all(math.isnan(value) for value in values_of(metric).values())


def test_repeated_images_count_once_and_batches_do_not_matter() -> None:
    rng = torch.Generator().manual_seed(0)
    found, truths = [], []
    for image in range(6):
        corner = torch.rand(image, 2, generator=rng) * 50
        boxes = torch.cat([corner, corner + 40], dim=1)
        truths.append(target(image, boxes.tolist(), [1] * image))
        found.append(boxes[: image // 2] + torch.rand(image // 2, 4, generator=rng) * 4)
    once, repeated = ProposalRecall(["cat"], top_k=(1, 2, 300)), ProposalRecall(["cat"], top_k=(1, 2, 300))
    once.update(found, truths)
    for image in (5, 2, 0, 1, 3, 2, 4, 5):
        repeated.update([found[image]], [truths[image]])
    np.testing.assert_array_equal(list(values_of(once).values()), list(values_of(repeated).values()))
    assert 0 < values_of(once)["proposal_recall@1"] < values_of(once)["proposal_recall@300"] < 1


def test_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    top_k = (3, 10, 40)
    metric = ProposalRecall(["cat"], top_k=top_k)
    best: dict[int, list[float]] = {k: [] for k in top_k}
    for image in range(8):
        corner = rng.integers(0, 40, (30, 2))
        boxes = np.hstack([corner, corner + rng.integers(5, 30, (30, 2))]).astype(float)
        objects, candidates = boxes[:4], boxes[4 : 4 + int(rng.integers(0, 27))]
        metric.update([proposals_of(candidates.tolist())], [target(image, objects.tolist(), [1] * 4)])
        for x1, y1, x2, y2 in objects:
            ious = []
            for a1, b1, a2, b2 in candidates:
                shared = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
                ious.append(shared / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - shared))
            for k in top_k:
                best[k].append(max(ious[:k], default=0.0))
    got = values_of(metric)
    for k in top_k:
        recalls = [np.mean(np.array(best[k]) >= t / 100) for t in range(50, 100, 5)]
        assert got[f"proposal_recall@{k}"] == pytest.approx(recalls[0], abs=1e-6)
        assert got[f"proposal_AR@{k}"] == pytest.approx(np.mean(recalls), abs=1e-6)


def test_bad_input_is_named() -> None:
    metric = ProposalRecall(["cat"])
    with pytest.raises(InputError, match="proposal 1 of image 4: box"):
        metric.update([proposals_of([[0, 0, 1, 1], [3, 0, 2, 1]])], [target(4, [], [])])
    with pytest.raises(InputError, match="proposals of 2 images for 1 targets"):
        metric.update([proposals_of([])] * 2, [target(4, [], [])])
    with pytest.raises(InputError, match=r"top_k is \[0, 5\]"):
        ProposalRecall(["cat"], top_k=(0, 5))


@pytest.mark.parametrize(("only", "recall"), [(("cat", "dog"), 1 / 3), (("cat",), 0.0), (("dog",), 0.5)])
def test_objects_of_the_chosen_classes_alone_count(only, recall) -> None:
    metric = ProposalRecall(["cat", "dog"], top_k=(5,))
    metric.only = only
    boxes = [[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]]
    metric.update([proposals_of(boxes[1:2])], [target(0, boxes, [1, 2, 2])])
    assert values_of(metric)["proposal_recall@5"] == pytest.approx(recall)
    assert tuple(metric.recall_per_class()) == only
