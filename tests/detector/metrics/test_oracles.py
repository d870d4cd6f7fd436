"""Detections with right labels and right boxes, by hand, and what holds for any detections."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.metrics.oracles import right_boxes, right_labels
from detector.metrics.voc_ap import Detections, evaluate_voc
from tests.detector.metrics.test_error_breakdown import (
    FAR,
    PART,
    SLICE,
    SLIVER,
    WHOLE,
    Object,
    Row,
    detections_of,
    objects_of,
)

NEAR = [0.0, 0.0, 100.0, 80.0]  # IoU 0.8 with WHOLE
HALF = [0.0, 0.0, 100.0, 50.0]  # IoU 0.5
CAT, DOG = 1, 2


def labelled(rows: list[Row], objects: list[Object]) -> list[tuple[int, float]]:
    found = right_labels(detections_of(rows), objects_of(objects), [CAT, DOG])
    return list(zip(found.label.tolist(), found.score.tolist(), strict=True))


def placed(rows: list[Row], objects: list[Object]) -> list[tuple[float, list[float]]]:
    found = right_boxes(detections_of(rows), objects_of(objects), [CAT, DOG])
    return list(zip(found.score.tolist(), found.box.tolist(), strict=True))


def ap(found: Detections, objects: list[Object]) -> list[tuple[float, float]]:
    return [(one.ap_voc07, one.ap_area) for one in evaluate_voc(found, objects_of(objects), [CAT, DOG]).per_class]


def test_a_label_is_right_where_the_box_lies_on_an_object_of_it() -> None:
    both = [(0, CAT, WHOLE, False), (0, DOG, NEAR, False)]
    assert labelled([(0, CAT, 0.9, NEAR), (0, DOG, 0.8, WHOLE)], both) == [(CAT, 0.9), (DOG, 0.8)]


def test_a_wrong_label_becomes_that_of_the_object_from_iou_one_half_on() -> None:
    objects = [(0, DOG, WHOLE, False), (1, DOG, WHOLE, False)]
    rows: list[Row] = [(0, CAT, 0.9, HALF), (1, CAT, 0.8, PART), (1, CAT, 0.7, FAR)]
    assert labelled(rows, objects) == [(DOG, 0.9), (CAT, 0.8), (CAT, 0.7)]


def test_the_object_with_the_highest_iou_gives_the_label() -> None:
    found = right_labels(
        detections_of([(0, 3, 0.9, NEAR)]), objects_of([(0, CAT, HALF, False), (0, DOG, WHOLE, False)]), [CAT, DOG, 3]
    )
    assert found.label.tolist() == [DOG]  # IoU 0.8 against 0.625


def test_no_correction_becomes_one_more_detection_of_an_object() -> None:
    found_already: list[Row] = [(0, CAT, 0.9, NEAR), (0, DOG, 0.5, NEAR), (0, DOG, 0.4, NEAR)]
    assert labelled(found_already, [(0, DOG, WHOLE, False)]) == [(DOG, 0.5), (DOG, 0.4)]  # its own duplicate stays
    two: list[Row] = [(0, CAT, 0.6, NEAR), (0, CAT, 0.9, HALF)]
    assert labelled(two, [(0, DOG, WHOLE, False)]) == [(DOG, 0.9)]


def test_what_lies_on_a_difficult_object_of_another_class_goes() -> None:
    assert labelled([(0, CAT, 0.9, NEAR)], [(0, DOG, WHOLE, True)]) == []
    assert labelled([(0, CAT, 0.9, NEAR)], [(0, CAT, WHOLE, True)]) == [(CAT, 0.9)]


def test_boxes_snap_to_the_object_of_their_class_from_iou_one_tenth_on() -> None:
    objects: list[Object] = [(0, CAT, WHOLE, False), (1, CAT, WHOLE, False), (2, CAT, WHOLE, False)]
    rows: list[Row] = [(0, CAT, 0.9, NEAR), (1, CAT, 0.8, SLICE), (2, CAT, 0.7, SLIVER), (2, DOG, 0.6, NEAR)]
    assert placed(rows, objects) == [(0.9, WHOLE), (0.8, WHOLE), (0.7, SLIVER), (0.6, NEAR)]


def test_badly_placed_boxes_of_an_object_that_is_found_go_and_duplicates_stay() -> None:
    rows: list[Row] = [(0, CAT, 0.9, PART), (0, CAT, 0.8, NEAR), (0, CAT, 0.7, HALF)]
    assert placed(rows, [(0, CAT, WHOLE, False)]) == [(0.8, WHOLE), (0.7, WHOLE)]
    assert placed([(0, CAT, 0.9, PART), (0, CAT, 0.8, SLICE)], [(0, CAT, WHOLE, False)]) == [(0.9, WHOLE)]


def test_badly_placed_boxes_of_a_difficult_object_go() -> None:
    assert placed([(0, CAT, 0.9, PART), (0, CAT, 0.8, NEAR)], [(0, CAT, WHOLE, True)]) == [(0.8, WHOLE)]


def test_average_precision_by_hand() -> None:
    objects: list[Object] = [(0, CAT, WHOLE, False), (1, DOG, WHOLE, False), (2, DOG, WHOLE, False)]
    rows: list[Row] = [(1, CAT, 0.9, NEAR), (0, CAT, 0.8, NEAR), (2, DOG, 0.7, PART)]
    found = detections_of(rows)
    assert [one[1] for one in ap(found, objects)] == [0.5, 0.0]
    assert [one[1] for one in ap(right_labels(found, objects_of(objects), [CAT, DOG]), objects)] == [1.0, 0.5]
    assert [one[1] for one in ap(right_boxes(found, objects_of(objects), [CAT, DOG]), objects)] == [0.5, 0.5]


def test_nothing_found_and_no_objects() -> None:
    assert labelled([], [(0, CAT, WHOLE, False)]) == []
    assert labelled([(0, CAT, 0.9, WHOLE)], []) == [(CAT, 0.9)]
    assert placed([(0, CAT, 0.9, WHOLE)], []) == [(0.9, WHOLE)]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_neither_lowers_the_ap50_of_a_class(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def boxes(number: int) -> list[list[float]]:
        corner, sides = rng.integers(0, 6, (number, 2)), rng.integers(1, 8, (number, 2))
        return np.hstack((corner, corner + sides)).astype(float).tolist()

    objects: list[Object] = [
        (int(rng.integers(2)), int(rng.integers(1, 3)), box, bool(rng.random() < 0.2))
        for box in boxes(int(rng.integers(9)))
    ]
    found = detections_of(
        [(int(rng.integers(2)), int(rng.integers(1, 3)), int(rng.integers(6)) / 5, box) for box in boxes(12)]
    )
    before = np.nan_to_num(ap(found, objects))
    for oracle in (right_labels, right_boxes):
        after = np.nan_to_num(ap(oracle(found, objects_of(objects), [CAT, DOG]), objects))
        assert (after >= before - 1e-12).all()


def test_arguments_are_left_as_they_are() -> None:
    found, objects = detections_of([(0, CAT, 0.9, PART), (0, CAT, 0.8, FAR)]), objects_of([(0, DOG, WHOLE, False)])
    for oracle in (right_labels, right_boxes):
        oracle(found, objects, [CAT, DOG])
    assert found.label.tolist() == [CAT, CAT]
    assert found.box.tolist() == [PART, FAR]
