from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from detector.errors import InputError
from detector.metrics.voc_ap import (
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    Detections,
    GroundTruth,
    assign,
    average_precisions,
    evaluate_voc,
)

Row = tuple[int, int, float, list[float]]  # image, label, score, box
Object = tuple[int, int, list[float], bool]  # image, label, box, difficult


def detections_of(rows: list[Row]) -> Detections:
    return Detections(
        image_id=np.array([row[0] for row in rows], dtype=np.int64),
        label=np.array([row[1] for row in rows], dtype=np.int64),
        score=np.array([row[2] for row in rows], dtype=np.float64),
        box=np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 4),
    )


def objects_of(rows: list[Object]) -> GroundTruth:
    return GroundTruth(
        image_id=np.array([row[0] for row in rows], dtype=np.int64),
        label=np.array([row[1] for row in rows], dtype=np.int64),
        box=np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4),
        difficult=np.array([row[3] for row in rows], dtype=np.bool_),
    )


def test_duplicate_of_found_object_is_false_though_it_overlaps_another() -> None:
    objects = objects_of([(0, 1, [0, 0, 100, 100], False), (0, 1, [0, 40, 100, 140], False)])
    # IoU of the second detection: 81/119 with the first object, 79/121 with the second
    found = detections_of([(0, 1, 0.9, [0, 0, 100, 100]), (0, 1, 0.8, [0, 19, 100, 119])])
    result = evaluate_voc(found, objects, [1])
    assert result.flags.tolist() == [TRUE_POSITIVE, FALSE_POSITIVE]
    assert result.ap_voc07 == pytest.approx(6 / 11)
    assert result.ap_area == pytest.approx(0.5)
    np.testing.assert_allclose(result.assignment.best_iou, [1.0, 81 / 119])
    assert result.assignment.best_object.tolist() == [0, 0]


def test_difficult_object_is_neither_to_be_found_nor_held_against() -> None:
    objects = objects_of([(0, 1, [0, 0, 100, 100], True), (0, 1, [200, 0, 300, 100], False)])
    found = detections_of(
        [
            (0, 1, 0.9, [0, 0, 100, 100]),  # the difficult object: ignored
            (0, 1, 0.8, [0, 0, 100, 90]),  # the same again: ignored too
            (0, 1, 0.7, [0, 0, 50, 50]),  # inside it, but IoU 0.25: false
            (0, 1, 0.6, [200, 0, 300, 100]),
        ]
    )
    result = evaluate_voc(found, objects, [1])
    assert result.flags.tolist() == [IGNORED, IGNORED, FALSE_POSITIVE, TRUE_POSITIVE]
    only = result.per_class[0]
    assert only.npos == 1
    np.testing.assert_allclose(only.precision, [0, 0.5])
    np.testing.assert_allclose(only.recall, [0, 1])
    np.testing.assert_allclose(only.scores, [0.7, 0.6])
    assert result.ap_voc07 == pytest.approx(0.5)
    assert result.ap_area == pytest.approx(0.5)


def test_iou_of_exactly_the_threshold_finds_the_object() -> None:
    objects = objects_of([(0, 1, [0, 0, 10, 20], False)])
    found = detections_of([(0, 1, 0.9, [0, 0, 10, 10])])
    assert evaluate_voc(found, objects, [1], iou_threshold=0.5).ap_area == 1.0
    assert evaluate_voc(found, objects, [1], iou_threshold=0.501).ap_area == 0.0


def test_first_of_two_objects_with_equal_iou_is_taken() -> None:
    objects = objects_of([(0, 1, [0, 0, 10, 10], False), (0, 1, [4, 0, 14, 10], False)])
    found = detections_of([(0, 1, 0.9, [2, 0, 12, 10]), (0, 1, 0.8, [0, 0, 10, 10]), (0, 1, 0.7, [4, 0, 14, 10])])
    result = evaluate_voc(found, objects, [1])
    assert result.assignment.best_object.tolist() == [0, 0, 1]
    assert result.flags.tolist() == [TRUE_POSITIVE, FALSE_POSITIVE, TRUE_POSITIVE]


def test_first_of_many_objects_with_equal_iou_is_taken() -> None:
    rows: list[Object] = [(image, 1, [0, 0, 10, 10], False) for image in range(3) for _ in range(500)]
    found = detections_of([(image, 1, 0.9, [0, 0, 10, 9]) for image in range(3)])
    assert assign(found, objects_of(rows)).best_object.tolist() == [0, 500, 1000]


def test_slightly_better_object_wins_over_an_earlier_one() -> None:
    objects = objects_of([(0, 1, [0, 0, 100, 100], False), (0, 1, [0.2, 0, 100.2, 100], False)])
    found = detections_of([(0, 1, 0.9, [0.2, 0, 100.2, 100]), (0, 1, 0.8, [0.2, 0, 100.2, 100])])
    result = evaluate_voc(found, objects, [1])
    assert result.assignment.best_object.tolist() == [1, 1]
    assert result.flags.tolist() == [TRUE_POSITIVE, FALSE_POSITIVE]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_equal_scores_are_taken_by_image_id_whatever_the_input_order(order: list[int]) -> None:
    objects = objects_of([(8, 1, [0, 0, 10, 10], False)])
    rows: list[Row] = [(3, 1, 0.5, [0, 0, 10, 10]), (8, 1, 0.5, [0, 0, 10, 10])]
    result = evaluate_voc(detections_of([rows[i] for i in order]), objects, [1])
    assert result.ap_area == pytest.approx(0.5)  # the false one, in the image of lower id, comes first


def test_equal_scores_within_an_image_keep_the_input_order() -> None:
    objects = objects_of([(0, 1, [0, 0, 10, 10], False)])
    rows: list[Row] = [(0, 1, 0.5, [0, 0, 10, 9]), (0, 1, 0.5, [0, 0, 10, 10])]
    assert evaluate_voc(detections_of(rows), objects, [1]).flags.tolist() == [TRUE_POSITIVE, FALSE_POSITIVE]
    assert evaluate_voc(detections_of(rows[::-1]), objects, [1]).flags.tolist() == [TRUE_POSITIVE, FALSE_POSITIVE]


def test_other_classes_and_other_images_are_not_looked_at() -> None:
    objects = objects_of([(0, 1, [0, 0, 10, 10], False), (1, 2, [0, 0, 10, 10], False)])
    found = detections_of([(0, 2, 0.9, [0, 0, 10, 10]), (1, 1, 0.9, [0, 0, 10, 10]), (5, 1, 0.9, [0, 0, 10, 10])])
    result = evaluate_voc(found, objects, [1, 2])
    assert result.flags.tolist() == [FALSE_POSITIVE] * 3
    assert result.ap_voc07 == 0.0


def test_class_without_objects_is_nan_and_left_out_of_the_mean() -> None:
    objects = objects_of([(0, 1, [0, 0, 10, 10], False), (0, 2, [50, 50, 60, 60], True)])
    found = detections_of([(0, 1, 0.9, [0, 0, 10, 10]), (0, 2, 0.9, [0, 0, 10, 10]), (0, 3, 0.9, [0, 0, 10, 10])])
    result = evaluate_voc(found, objects, [1, 2, 3])
    assert [one.npos for one in result.per_class] == [1, 0, 0]
    np.testing.assert_array_equal([one.ap_voc07 for one in result.per_class], [1.0, np.nan, np.nan])
    np.testing.assert_array_equal([one.ap_area for one in result.per_class], [1.0, np.nan, np.nan])
    assert result.ap_voc07 == 1.0
    assert result.ap_area == 1.0


def test_no_detections_is_zero_and_no_objects_is_nan() -> None:
    objects = objects_of([(0, 1, [0, 0, 10, 10], False)])
    found = detections_of([(0, 1, 0.9, [0, 0, 10, 10])])
    nothing_found = evaluate_voc(detections_of([]), objects, [1])
    assert (nothing_found.ap_voc07, nothing_found.ap_area) == (0.0, 0.0)
    nothing_there = evaluate_voc(found, objects_of([]), [1])
    assert np.isnan([nothing_there.ap_voc07, nothing_there.ap_area]).all()
    assert nothing_there.flags.tolist() == [FALSE_POSITIVE]
    assert np.isnan(evaluate_voc(detections_of([]), objects_of([]), [1]).ap_area)


@pytest.mark.parametrize("npos", [10, 30, 70])
def test_recall_steps_reached_exactly_count(npos: int) -> None:
    # True, false, true, false ...: precision at the i-th true positive is i / (2i - 1), which only falls
    is_true = np.arange(2 * npos) % 2 == 0
    steps = [max(npos * k // 10, 1) for k in range(11)]
    ap_voc07, ap_area = average_precisions(is_true, npos)
    assert ap_voc07 == pytest.approx(sum(i / (2 * i - 1) for i in steps) / 11, abs=1e-12)
    assert ap_area == pytest.approx(sum(i / (2 * i - 1) for i in range(1, npos + 1)) / npos, abs=1e-12)


@pytest.mark.parametrize("found", range(11))
def test_eleven_points_of_perfect_precision_up_to_each_recall_step(found: int) -> None:
    ap_voc07, ap_area = average_precisions(np.ones(found, dtype=np.bool_), npos=10)
    assert ap_voc07 == pytest.approx((found + 1) / 11 if found else 0.0, abs=1e-12)
    assert ap_area == pytest.approx(found / 10, abs=1e-12)


def test_envelope_lifts_a_dip_of_the_precision() -> None:
    # precisions 0, 1/2, 2/3: both steps of recall see 2/3
    assert average_precisions(np.array([False, True, True]), npos=2) == pytest.approx((2 / 3, 2 / 3))


def literal_devkit(
    found: Detections, objects: GroundTruth, label: int, threshold: Fraction
) -> tuple[float, float, list[float], list[float]]:
    """The devkit's loops over inclusive integer boxes ("+1" in every side), with exact fractions."""
    mine = [i for i in range(len(found)) if found.label[i] == label]
    mine.sort(key=lambda i: (-found.score[i], found.image_id[i]))
    theirs = [j for j in range(len(objects)) if objects.label[j] == label]
    npos = sum(not objects.difficult[j] for j in theirs)
    taken: set[int] = set()
    precision, recall = [], []
    tp = fp = 0
    for i in mine:
        best, best_overlap = -1, Fraction(-1)
        x1, y1, x2, y2 = (int(v) for v in found.box[i])
        for j in theirs:
            if objects.image_id[j] != found.image_id[i]:
                continue
            a1, b1, a2, b2 = (int(v) for v in objects.box[j])
            width = min(x2, a2) - max(x1, a1) + 1
            height = min(y2, b2) - max(y1, b1) + 1
            if width > 0 and height > 0:
                union = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1) - width * height
                if Fraction(width * height, union) > best_overlap:
                    best, best_overlap = j, Fraction(width * height, union)
        if best_overlap >= threshold:
            if objects.difficult[best]:
                continue
            if best in taken:
                fp += 1
            else:
                taken.add(best)
                tp += 1
        else:
            fp += 1
        precision.append(Fraction(tp, tp + fp))
        recall.append(Fraction(tp, npos))
    eleven = Fraction(0)
    for step in range(11):
        eleven += max(
            (p for p, r in zip(precision, recall, strict=True) if r >= Fraction(step, 10)), default=Fraction(0)
        )
    padded_recall = [Fraction(0), *recall, Fraction(1)]
    envelope = [Fraction(0), *precision, Fraction(0)]
    for i in range(len(envelope) - 2, -1, -1):
        envelope[i] = max(envelope[i], envelope[i + 1])
    area = sum(
        ((padded_recall[i] - padded_recall[i - 1]) * envelope[i] for i in range(1, len(padded_recall))), Fraction(0)
    )
    return float(eleven / 11), float(area), [float(p) for p in precision], [float(r) for r in recall]


def random_inclusive_split(seed: int) -> tuple[Detections, GroundTruth]:
    """Few pixels, few scores, many objects: equal IoUs, IoUs of exactly 1/2, equal scores and duplicates all occur."""
    rng = np.random.default_rng(seed)
    d, g = 400, 150

    def boxes(n: int) -> np.ndarray:
        corner = rng.integers(1, 8, (n, 2))
        return np.hstack([corner, corner + rng.integers(0, 8, (n, 2))]).astype(np.float64)

    objects = GroundTruth(rng.integers(0, 20, g) * 7, rng.integers(1, 4, g), boxes(g), rng.random(g) < 0.2)
    origin = rng.integers(0, g, d)
    jitter = np.sort(rng.integers(-1, 2, (d, 2, 2)), axis=1).reshape(d, 4)  # never inverts a box
    near = rng.random(d) < 0.5
    found = Detections(
        image_id=np.where(near, objects.image_id[origin], rng.integers(0, 20, d) * 7),
        label=np.where(near, objects.label[origin], rng.integers(1, 4, d)),
        score=rng.integers(0, 30, d) / 30,
        box=np.where(near[:, None], objects.box[origin] + jitter, boxes(d)),
    )
    return found, objects


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [Fraction(1, 2), Fraction(7, 10)])
def test_random_data_equals_the_literal_rules(seed: int, threshold: Fraction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detector.metrics.voc_ap._PAIRS_PER_CHUNK", 50)
    found, objects = random_inclusive_split(seed)
    shift = np.array([1, 1, 0, 0])  # the reading of VOC: 1 off the lower corner makes the boxes continuous
    result = evaluate_voc(
        replace(found, box=found.box - shift), replace(objects, box=objects.box - shift), [1, 2, 3], float(threshold)
    )
    expected = [literal_devkit(found, objects, label, threshold) for label in (1, 2, 3)]
    for got, (ap_voc07, ap_area, precision, recall) in zip(result.per_class, expected, strict=True):
        assert got.ap_voc07 == pytest.approx(ap_voc07, abs=1e-9)
        assert got.ap_area == pytest.approx(ap_area, abs=1e-9)
        np.testing.assert_allclose(got.precision, precision, atol=1e-9)
        np.testing.assert_allclose(got.recall, recall, atol=1e-9)
    assert result.ap_voc07 == pytest.approx(np.mean([one[0] for one in expected]), abs=1e-9)
    assert set(result.flags.tolist()) == {IGNORED, FALSE_POSITIVE, TRUE_POSITIVE}


def test_one_assignment_serves_every_threshold() -> None:
    found, objects = random_inclusive_split(0)
    assignment = assign(found, objects)
    for threshold in (0.5, 0.75):
        reused = evaluate_voc(found, objects, [1, 2, 3], threshold, assignment)
        assert reused.ap_area == evaluate_voc(found, objects, [1, 2, 3], threshold).ap_area
    assert evaluate_voc(found, objects, [1, 2, 3], 0.5).ap_area > evaluate_voc(found, objects, [1, 2, 3], 0.75).ap_area


def test_flags_per_class_point_at_the_detections() -> None:
    found, objects = random_inclusive_split(1)
    result = evaluate_voc(found, objects, [1, 2, 3])
    for one in result.per_class:
        assert (found.label[one.order] == one.label).all()
        assert (np.diff(found.score[one.order]) <= 0).all()
        np.testing.assert_array_equal(one.flags, result.flags[one.order])
        np.testing.assert_array_equal(one.scores, found.score[one.order][one.flags != IGNORED])
    assert sum(len(one.order) for one in result.per_class) == len(found)


def test_empty_boxes_overlap_nothing() -> None:
    objects = objects_of([(0, 1, [5, 5, 5, 5], False)])
    found = detections_of([(0, 1, 0.9, [5, 5, 5, 5])])
    assert evaluate_voc(found, objects, [1]).flags.tolist() == [FALSE_POSITIVE]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [(0, 1, 0.5, [0, 0, 1, 1]), (0, 1, float("nan"), [0, 0, 1, 1])],
            "row 1 has a score that is not finite; 1 of 2",
        ),
        ([(0, 1, 0.5, [0, 0, 1, float("inf")])], "row 0 has a coordinate that is not finite"),
        ([(0, 1, 0.5, [0, 0, 1, 1]), (0, 1, 0.4, [5, 0, 4, 1])], "row 1 has a box of negative size"),
    ],
)
def test_bad_detections_are_named(rows: list[Row], message: str) -> None:
    with pytest.raises(InputError, match=message):
        detections_of(rows)


def test_bad_threshold_and_unequal_lengths_are_named() -> None:
    with pytest.raises(InputError, match=r"iou_threshold is 0\.0"):
        evaluate_voc(detections_of([]), objects_of([]), [1], iou_threshold=0.0)
    with pytest.raises(InputError, match=r"label has shape \(2,\); 1 image ids need \(1,\)"):
        Detections(np.zeros(1, np.int64), np.zeros(2, np.int64), np.zeros(1), np.zeros((1, 4)))
