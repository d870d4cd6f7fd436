"""Rules of COCO's matching that a whole evaluation on random boxes hardly shows, by hand."""

import numpy as np

from detector.metrics.coco_matching import match_coco
from detector.metrics.voc_ap import FALSE_POSITIVE, TRUE_POSITIVE, Detections, GroundTruth


def test_of_equal_overlaps_the_last_object_is_taken() -> None:
    """The first detection overlaps both objects by 2/3. It takes the last one, so the second detection, which is the
    first object itself and overlaps the other by 3/7, finds its own."""
    box = np.array([[10.0, 0, 20, 10], [8.0, 0, 18, 10]])
    objects = np.array([[8.0, 0, 18, 10], [12.0, 0, 22, 10]])
    one, two = np.zeros(2, np.int64), np.ones(2, np.int64)
    found = Detections(one, two, np.array([0.9, 0.8]), box)
    truth = GroundTruth(one, two, objects, np.zeros(2, np.bool_))
    (matches,) = match_coco(found, truth, np.array([0]), [1])
    assert matches.flags[0, 0].tolist() == [TRUE_POSITIVE, TRUE_POSITIVE]
    assert matches.flags[0, 5].tolist() == [FALSE_POSITIVE, TRUE_POSITIVE]  # at 0.75 only the exact one


def test_a_hundred_detections_of_an_image_and_class_count() -> None:
    """The only right one is the 101st by score: it is not looked at; of another class it is."""
    wrong, right = np.tile([50.0, 50, 60, 60], (100, 1)), np.array([[0.0, 0, 10, 10]])
    score = np.linspace(0.9, 0.1, 101)
    truth = GroundTruth(np.array([7]), np.array([1]), right, np.zeros(1, np.bool_))
    for label, counted in ((1, 100), (2, 101)):
        labels = np.array([label] * 100 + [1])
        found = Detections(np.full(101, 7), labels, score, np.concatenate([wrong, right]))
        matches = {one.label: one for one in match_coco(found, truth, np.array([7]), [1, 2])}
        assert sum(one.flags.shape[2] for one in matches.values()) == counted
        assert bool((matches[1].flags[0, 0] == TRUE_POSITIVE).any()) == (label == 2)
