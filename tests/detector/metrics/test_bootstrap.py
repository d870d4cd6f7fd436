import numpy as np
import pytest

from detector.errors import InputError
from detector.metrics import bootstrap as module
from detector.metrics.bootstrap import bootstrap, draw_images, interval, share_above_zero
from detector.metrics.coco_ap import evaluate_coco
from detector.metrics.detection_ap import EvaluatedSplit, average_precisions_by_name
from detector.metrics.voc_ap import Detections, GroundTruth

NAMES = ("cat", "dog", "cow")


def random_split(seed: int, images: int = 30, objects: int = 90, detections: int = 400) -> EvaluatedSplit:
    """Objects of three sizes and two classes (the third has none), difficult ones among them; equal scores between
    images but not within one."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 200, (objects, 2))
    box = np.hstack(
        [corner, corner + rng.choice([16.0, 50.0, 120.0], (objects, 1)) * rng.uniform(0.8, 1.2, (objects, 2))]
    )
    truth = GroundTruth(
        np.sort(rng.integers(0, images - 2, objects)), rng.integers(1, 3, objects), box, rng.random(objects) < 0.2
    )
    origin = rng.integers(0, objects, detections)
    side = (box[origin, 2:] - box[origin, :2]).repeat(2, axis=0).reshape(detections, 4)
    found = box[origin] + rng.normal(0, 0.12, (detections, 4)) * side
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
    label = np.where(rng.random(detections) < 0.8, truth.label[origin], rng.integers(1, 4, detections))
    image = np.where(rng.random(detections) < 0.8, truth.image_id[origin], rng.integers(0, images, detections))
    order = np.argsort(image, kind="stable")
    rank = np.arange(detections) - np.searchsorted(image[order], image[order])
    score = np.empty(detections)
    score[order] = ((rank * 37) % 101) / 101
    return EvaluatedSplit(np.arange(images), Detections(image, label, score, found), truth)


def resample(split: EvaluatedSplit, resamples: int, **options: int) -> dict[str, np.ndarray]:
    return bootstrap(split.detections, split.ground_truth, split.image_id, NAMES, resamples, **options)


def copied(split: EvaluatedSplit, count: np.ndarray) -> EvaluatedSplit:
    """The images as they were drawn: one that was drawn twice is there twice, under two ids."""
    drawn = np.repeat(split.image_id, count.astype(int))
    found, truth = split.detections, split.ground_truth
    rows = [np.flatnonzero(found.image_id == image) for image in drawn]
    object_rows = [np.flatnonzero(truth.image_id == image) for image in drawn]
    at, object_at = np.concatenate(rows), np.concatenate(object_rows)
    new, new_object = (np.repeat(np.arange(len(drawn)), [len(row) for row in part]) for part in (rows, object_rows))
    return EvaluatedSplit(
        np.arange(len(drawn)),
        Detections(new, found.label[at], found.score[at], found.box[at]),
        GroundTruth(new_object, truth.label[object_at], truth.box[object_at], truth.difficult[object_at]),
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_image_drawn_once_gives_the_metric_itself(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_images", lambda images, resamples, _: np.ones((images, resamples), np.float32))
    split = random_split(seed)
    expected = average_precisions_by_name(split, NAMES)
    samples = resample(split, 2)
    assert samples.keys() == expected.keys() - {"AR@1", "AR@10", "AR@100"}
    for name, values in samples.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-12, err_msg=name)
    assert all(0 < expected[f"AP_{size}"] < 1 for size in ("small", "medium", "large"))
    assert np.isnan(expected["AP50_voc_class/cow"])


def test_resamples_equal_evaluations_of_copied_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESAMPLES_AT_ONCE", 5)
    split = random_split(7)
    samples = resample(split, 12, seed=3)
    for index, count in enumerate(draw_images(30, 12, 3).T):
        expected = average_precisions_by_name(copied(split, count), NAMES)
        for name, values in samples.items():
            np.testing.assert_allclose(values[index], expected[name], atol=1e-12, err_msg=name)
    assert len(set(samples["AP"])) == 12


def test_two_images_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image whose object is found, one whose object is missed and that has a better scored false detection."""
    counts = np.array([[2, 1, 0], [0, 1, 2]], dtype=np.float32)
    monkeypatch.setattr(module, "draw_images", lambda *_: counts)
    found = Detections(
        np.array([5, 9]), np.array([1, 1]), np.array([0.5, 0.9]), np.array([[0, 0, 10, 10], [50, 50, 60, 60.0]])
    )
    truth = GroundTruth(np.array([5, 9]), np.array([1, 1]), np.array([[0, 0, 10, 10.0]] * 2), np.zeros(2, np.bool_))
    samples = bootstrap(found, truth, np.array([5, 9]), ["cat"], resamples=3)
    np.testing.assert_allclose(samples["AP50_voc"], [1, 0.25, 0])
    np.testing.assert_allclose(samples["AP50_voc07"], [1, 3 / 11, 0])
    np.testing.assert_allclose(samples["AP50"], [1, 0.5 * 51 / 101, 0])


def test_class_without_objects_in_a_resample_is_left_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_images", lambda *_: np.array([[2, 1, 0], [0, 1, 2]], dtype=np.float32))
    box = np.array([[0, 0, 10, 10.0]] * 2)
    truth = GroundTruth(np.array([0, 1]), np.array([1, 2]), box, np.zeros(2, np.bool_))
    found = Detections(np.array([0]), np.array([1]), np.array([0.9]), box[:1])
    samples = bootstrap(found, truth, np.array([0, 1]), ["cat", "dog"], resamples=3)
    np.testing.assert_array_equal(samples["AP50_voc_class/dog"], [np.nan, 0, 0])
    np.testing.assert_array_equal(samples["AP50_voc"], [1, 0.5, 0])
    np.testing.assert_array_equal(samples["AP"], [1, 0.5, 0])
    np.testing.assert_array_equal(samples["AP_large"], [np.nan] * 3)


def test_recall_of_35_hundredths_does_not_reach_its_point_of_coco(monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO's own rounding: 0.35 as a point of recall is 35 * 0.01, a little more than 35 / 100."""
    monkeypatch.setattr(module, "draw_images", lambda *_: np.ones((100, 2), np.float32))
    box = np.array([[0, 0, 10, 10.0]] * 100)
    truth = GroundTruth(np.arange(100), np.ones(100, np.int64), box, np.zeros(100, np.bool_))
    found = Detections(np.arange(35), np.ones(35, np.int64), np.full(35, 0.5), box[:35])
    samples = bootstrap(found, truth, np.arange(100), ["cat"], resamples=2)
    assert evaluate_coco(found, truth, np.arange(100), [1])["AP50"] == pytest.approx(35 / 101)
    np.testing.assert_allclose(samples["AP50"], 35 / 101)  # points 0, 0.01 ... 0.34


def test_draws_are_as_many_as_images_and_follow_the_seed() -> None:
    counts = draw_images(40, 500, seed=1)
    assert (counts.sum(axis=0) == 40).all()
    np.testing.assert_array_equal(counts, draw_images(40, 500, seed=1))
    assert (counts != draw_images(40, 500, seed=2)).any()
    np.testing.assert_allclose(counts.mean(axis=1), 1.0, atol=0.25)
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 40) ** 40, abs=0.01)


def test_resamples_of_two_detectors_are_paired() -> None:
    split = random_split(1)
    found = split.detections
    worse = found.box.copy()
    worse[found.image_id == 4] += 500  # the same detector, but for one image
    other = EvaluatedSplit(
        split.image_id, Detections(found.image_id, found.label, found.score, worse), split.ground_truth
    )
    ours, theirs = resample(split, 200), resample(other, 200)
    difference = ours["AP50_voc"] - theirs["AP50_voc"]
    assert (difference >= 0).all()
    between, alone = interval(difference), interval(ours["AP50_voc"])
    assert between.high - between.low < 0.8 * (alone.high - alone.low)
    assert share_above_zero(difference) == pytest.approx((draw_images(30, 200, 0)[4] > 0).mean() * 0.5 + 0.5, abs=0.02)
    np.testing.assert_array_equal(ours["AP"], resample(split, 200)["AP"])


def test_interval_is_the_middle_of_what_is_known() -> None:
    between = interval(np.append(np.arange(101.0), np.nan))
    assert (between.low, between.high) == pytest.approx((2.5, 97.5))
    wide = interval(np.arange(101.0), level=0.5)
    assert (wide.low, wide.high) == pytest.approx((25, 75))
    assert np.isnan(interval(np.array([np.nan])).low)
    assert share_above_zero(np.array([1.0, 0.0, -1.0, np.nan])) == pytest.approx(0.5)
    assert share_above_zero(np.array([1.0, 2.0, -1.0, 0.0])) == pytest.approx(0.625)
    assert np.isnan(share_above_zero(np.array([np.nan])))


def test_intervals_cover_what_they_should() -> None:
    """Of 80 test sets of 60 images from a population with AP 1/2, the intervals of most hold 1/2."""
    rng = np.random.default_rng(0)
    box = np.array([[0, 0, 10, 10.0]])
    covered = 0
    for _ in range(80):
        right = rng.random(60) < 0.5
        truth = GroundTruth(np.arange(60), np.ones(60, np.int64), box.repeat(60, 0), np.zeros(60, np.bool_))
        image = np.flatnonzero(right)
        found = Detections(image, np.ones(len(image), np.int64), rng.random(len(image)), box.repeat(len(image), 0))
        between = interval(bootstrap(found, truth, np.arange(60), ["cat"], 200, coco=False)["AP50_voc"])
        covered += between.low <= 0.5 <= between.high
    assert 70 <= covered <= 80


def test_resamples_are_counted_together_and_not_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detections are matched once, and 1,000 resamples are counted in a few blocks per class."""
    calls = dict.fromkeys(("evaluate_voc", "_curve"), 0)

    def counted(name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: object) -> object:
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    for name in calls:
        counted(name)
    split = random_split(2, images=500, objects=1500, detections=20000)
    samples = bootstrap(split.detections, split.ground_truth, split.image_id, NAMES, 1000, coco=False)
    assert calls == {"evaluate_voc": 1, "_curve": len(NAMES) * -(-1000 // module._RESAMPLES_AT_ONCE)}
    assert calls["_curve"] <= 60
    assert samples["AP50_voc07"].std() < 0.05


@pytest.mark.parametrize(("resamples", "images"), [(1, 5), (1000, 0)])
def test_too_few_resamples_or_images(resamples: int, images: int) -> None:
    empty = np.zeros(0, np.int64)
    nothing = Detections(empty, empty, np.zeros(0), np.zeros((0, 4)))
    truth = GroundTruth(empty, empty, np.zeros((0, 4)), np.zeros(0, np.bool_))
    with pytest.raises(InputError, match=f"{resamples} resamples of {images} images"):
        bootstrap(nothing, truth, np.arange(images), ["cat"], resamples)
