import numpy as np
import pytest

from detector.errors import InputError
from detector.metrics.error_breakdown import KINDS, ErrorBreakdown, break_down_errors, costs_of_mistakes
from detector.metrics.voc_ap import Detections, GroundTruth, evaluate_voc, pairwise_iou

Row = tuple[int, int, float, list[float]]  # image, label, score, box
Object = tuple[int, int, list[float], bool]  # image, label, box, difficult

WHOLE = [0.0, 0.0, 100.0, 100.0]
PART = [0.0, 0.0, 100.0, 40.0]  # IoU 0.4 with WHOLE
SLICE = [0.0, 0.0, 100.0, 10.0]  # IoU 0.1
SLIVER = [0.0, 0.0, 100.0, 9.0]  # IoU 0.09
FAR = [300.0, 0.0, 400.0, 100.0]


def detections_of(rows: list[Row]) -> Detections:
    images, labels, scores, boxes = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Detections(
        np.array(images, np.int64), np.array(labels, np.int64), np.array(scores), np.array(boxes).reshape(-1, 4)
    )


def objects_of(rows: list[Object]) -> GroundTruth:
    images, labels, boxes, difficult = zip(*rows, strict=True) if rows else ((), (), (), ())
    return GroundTruth(
        np.array(images, np.int64),
        np.array(labels, np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(difficult, np.bool_),
    )


def broken_down(found: list[Row], objects: list[Object]) -> ErrorBreakdown:
    return break_down_errors(detections_of(found), objects_of(objects), [1, 2])


def kinds_of(errors: ErrorBreakdown) -> list[str | None]:
    return [KINDS[kind] if kind >= 0 else None for kind in errors.kind]


def gains(errors: ErrorBreakdown, label: int) -> dict[str, float]:
    """The kinds that gain something for a class."""
    return {kind: pytest.approx(gain[label - 1]) for kind, gain in errors.gain.items() if gain[label - 1] != 0}


def test_localisation_makes_a_true_positive_of_the_object() -> None:
    errors = broken_down([(0, 1, 0.9, PART), (0, 1, 0.8, SLICE)], [(0, 1, WHOLE, False)])
    assert kinds_of(errors) == ["localisation", "localisation"]
    assert gains(errors, 1) == {"localisation": 1.0}  # the better one becomes right, the other goes
    assert errors.ap[0] == 0.0
    assert not errors.missed.any()
    assert errors.count["localisation"].tolist() == [2, 0]


def test_localisation_of_an_object_found_already_is_removed() -> None:
    errors = broken_down([(0, 1, 0.9, PART), (0, 1, 0.8, WHOLE)], [(0, 1, WHOLE, False)])
    assert kinds_of(errors) == ["localisation", None]
    assert errors.ap[0] == pytest.approx(0.5)
    assert gains(errors, 1) == {"localisation": 0.5}


def test_classification_moves_the_detection_to_the_class_of_the_object() -> None:
    errors = broken_down([(0, 2, 0.9, WHOLE), (1, 2, 0.8, WHOLE)], [(0, 1, WHOLE, False), (1, 2, WHOLE, False)])
    assert kinds_of(errors) == ["classification", None]
    np.testing.assert_allclose(errors.ap, [0.0, 0.5])
    assert gains(errors, 1) == {"classification": 1.0}
    assert gains(errors, 2) == {"classification": 0.5}
    assert errors.mean_gain()["classification"] == pytest.approx(0.75)
    assert errors.count["classification"].tolist() == [0, 1]  # an error of the class that was claimed
    assert not errors.missed.any()


def test_classification_keeps_its_score_in_the_class_of_the_object() -> None:
    objects: list[Object] = [(0, 1, WHOLE, False), (1, 1, WHOLE, False)]
    # class 1: a background detection at 0.8, then a right one at 0.7; the corrected one comes before or between
    for score, ap in ((0.9, (1 + 2 / 3) / 2), (0.75, (2 / 3 + 2 / 3) / 2)):
        errors = broken_down([(0, 2, score, WHOLE), (1, 1, 0.8, FAR), (1, 1, 0.7, WHOLE)], objects)
        assert errors.ap[0] == pytest.approx(0.25)
        assert errors.gain["classification"][0] == pytest.approx(ap - 0.25)


def test_duplicate_is_removed() -> None:
    found: list[Row] = [(0, 1, 0.9, WHOLE), (0, 1, 0.8, WHOLE), (1, 1, 0.7, WHOLE)]
    errors = broken_down(found, [(0, 1, WHOLE, False), (1, 1, WHOLE, False)])
    assert kinds_of(errors) == [None, "duplicate", None]
    assert errors.ap[0] == pytest.approx(5 / 6)
    assert gains(errors, 1) == {"duplicate": 1 / 6}


def test_wrong_class_in_the_wrong_place_is_removed_and_its_object_missed() -> None:
    errors = broken_down([(0, 2, 0.9, PART), (1, 2, 0.8, WHOLE)], [(0, 1, WHOLE, False), (1, 2, WHOLE, False)])
    assert kinds_of(errors) == ["both", None]
    assert gains(errors, 2) == {"both": 0.5}
    assert gains(errors, 1) == {"missed": 1.0}  # nothing of the class is left to be found
    assert errors.missed.tolist() == [True, False]


@pytest.mark.parametrize("box", [FAR, SLIVER])
def test_background_is_removed(box: list[float]) -> None:
    errors = broken_down([(0, 1, 0.9, box), (0, 1, 0.8, WHOLE)], [(0, 1, WHOLE, False)])
    assert kinds_of(errors) == ["background", None]
    assert gains(errors, 1) == {"background": 0.5}


def test_missed_object_is_no_longer_to_be_found() -> None:
    found: list[Row] = [(0, 1, 0.9, FAR), (0, 1, 0.8, WHOLE)]
    errors = broken_down(found, [(0, 1, WHOLE, False), (1, 1, WHOLE, False), (2, 1, WHOLE, False)])
    assert errors.missed.tolist() == [False, True, True]
    assert errors.ap[0] == pytest.approx(0.5 / 3)
    assert gains(errors, 1) == {"background": 1 / 3 - 0.5 / 3, "missed": 0.5 - 0.5 / 3}
    assert errors.count["missed"].tolist() == [2, 0]


def test_difficult_objects_are_no_background_yet_bring_nothing_and_are_not_missed() -> None:
    found: list[Row] = [(0, 1, 0.9, PART), (1, 1, 0.8, WHOLE), (2, 1, 0.7, WHOLE), (3, 1, 0.6, WHOLE)]
    objects: list[Object] = [(0, 1, WHOLE, True), (1, 1, WHOLE, True), (2, 2, WHOLE, True), (3, 1, WHOLE, False)]
    errors = broken_down(found, objects)
    assert kinds_of(errors) == ["localisation", None, "classification", None]
    assert errors.ap[0] == pytest.approx(1 / 3)
    assert gains(errors, 1) == {"localisation": 1 / 2 - 1 / 3, "classification": 1 / 2 - 1 / 3}
    assert not errors.missed.any()
    assert np.isnan(errors.ap[1])  # only a difficult object: left out
    assert all(np.isnan(errors.gain[kind][1]) for kind in KINDS)


def test_a_perfect_detector_and_an_empty_split() -> None:
    perfect = broken_down([(0, 1, 0.9, WHOLE)], [(0, 1, WHOLE, False)])
    assert perfect.mean_gain() == dict.fromkeys(KINDS, 0.0)
    silent = broken_down([], [(0, 1, WHOLE, False)])
    assert silent.mean_gain() == dict.fromkeys(KINDS[:-1], 0.0) | {"missed": 1.0}
    assert all(np.isnan(value) for value in broken_down([(0, 1, 0.9, WHOLE)], []).mean_gain().values())


def literal(found: Detections, objects: GroundTruth, labels: list[int]) -> tuple[list[str | None], dict[str, float]]:
    """Kind of each detection, and mean gains, in plain loops."""
    flags = evaluate_voc(found, objects, labels).flags
    order = sorted(range(len(found)), key=lambda i: (-found.score[i], found.image_id[i], i))
    kinds: list[str | None] = [None] * len(found)
    target: dict[int, int] = {}
    hit: set[int] = set()
    for i in order:
        own, other, own_at, other_at = 0.0, 0.0, -1, -1
        for j in range(len(objects)):
            if objects.image_id[j] == found.image_id[i]:
                iou = float(pairwise_iou(found.box[i : i + 1], objects.box[j : j + 1])[0])
                if objects.label[j] == found.label[i] and iou > own:
                    own, own_at = iou, j
                if objects.label[j] != found.label[i] and iou > other:
                    other, other_at = iou, j
        if flags[i] == 1:
            hit.add(own_at)
        if flags[i] != 0:
            continue
        if 0.1 <= own < 0.5:
            kinds[i], target[i] = "localisation", own_at
        elif other >= 0.5:
            kinds[i], target[i] = "classification", other_at
        elif own >= 0.5:
            kinds[i] = "duplicate"
        else:
            kinds[i] = "both" if other >= 0.1 else "background"

    def mean_ap(kind: str | None) -> float:
        used = set(hit)
        rows: dict[int, list[int]] = {label: [] for label in labels}
        for i in order:
            if kinds[i] is None:
                if flags[i] == 1:
                    rows[int(found.label[i])].append(1)
            elif kinds[i] != kind:
                rows[int(found.label[i])].append(0)
            elif i in target and target[i] not in used and not objects.difficult[target[i]]:
                used.add(target[i])
                rows[int(objects.label[target[i]])].append(1)
        aps = []
        for label in labels:
            alive = [
                j
                for j in range(len(objects))
                if objects.label[j] == label and not objects.difficult[j]
                and not (kind == "missed" and j not in hit and j not in target.values())
            ]  # fmt: skip
            precision = [sum(rows[label][: k + 1]) / (k + 1) for k in range(len(rows[label]))]
            best = [max(precision[k:]) for k in range(len(precision)) if rows[label][k]]
            aps.append(sum(best) / len(alive) if alive else 1.0)
        return float(np.mean(aps))

    return kinds, {kind: mean_ap(kind) - mean_ap(None) for kind in KINDS}


@pytest.mark.parametrize("seed", range(3))
def test_random_data_equals_plain_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, g, labels = 250, 80, [1, 2, 3]
    corner = rng.uniform(0, 60, (g, 2))
    objects = GroundTruth(
        rng.integers(0, 15, g), rng.integers(1, 4, g), np.hstack([corner, corner + rng.uniform(20, 60, (g, 2))]),
        rng.random(g) < 0.2,
    )  # fmt: skip
    origin = rng.integers(0, g // 2, d)  # the others are found by chance only
    box = objects.box[origin] + rng.normal(0, 9, (d, 4))
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2])
    label = np.where(rng.random(d) < 0.6, objects.label[origin], rng.integers(1, 4, d))
    image = np.where(rng.random(d) < 0.8, objects.image_id[origin], rng.integers(0, 15, d))
    found = Detections(image, label, rng.random(d), box)
    errors = break_down_errors(found, objects, labels)
    kinds, mean_gain = literal(found, objects, labels)
    assert kinds_of(errors) == kinds
    assert {kind for kind in kinds if kind} == set(KINDS[:-1])
    assert errors.missed.any()
    for kind in KINDS:
        assert errors.mean_gain()[kind] == pytest.approx(mean_gain[kind], abs=1e-12)


def test_thresholds_must_rise() -> None:
    with pytest.raises(InputError, match=r"background_iou 0\.5, iou_threshold 0\.5"):
        break_down_errors(detections_of([]), objects_of([]), [1], 0.5, 0.5)


def test_costs_trace_lost_precision_to_its_causes() -> None:
    """Class 1 has three objects: found at rank 1, found at rank 3 behind one false positive, never found.

    The false positive costs the second object 1/3 of its precision; the last object lacks all of its own: of 3 objects
    and 2 classes these are 1/18 and 1/6. The false positive at rank 4 costs nothing; class 2 is never found, 1/2.
    """
    found: list[Row] = [(0, 1, 0.9, WHOLE), (1, 1, 0.8, FAR), (1, 1, 0.7, WHOLE), (2, 1, 0.6, FAR)]
    objects: list[Object] = [
        (0, 1, WHOLE, False), (1, 1, WHOLE, False), (2, 1, WHOLE, False), (2, 2, WHOLE, False), (0, 2, FAR, True),
    ]  # fmt: skip
    errors = broken_down([found[i] for i in (2, 0, 3, 1)], objects)
    cost, object_cost = costs_of_mistakes(errors.matched, objects_of(objects))
    assert cost == pytest.approx([0, 0, 0, 1 / 18])
    assert object_cost == pytest.approx([0, 0, 1 / 6, 1 / 2, 0])
    assert cost.sum() + object_cost.sum() == pytest.approx(1 - (1 + 2 / 3) / 3 / 2)
