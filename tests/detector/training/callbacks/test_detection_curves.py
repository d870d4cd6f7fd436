"""Curves at chosen validations, as TensorBoard reads them."""

import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.util import tensor_util

from detector.metrics.curves import SCORE_THRESHOLDS
from detector.training.callbacks.detection_curves import DetectionCurves
from tests.detector.training.callbacks.test_anchor_telemetry import VALIDATION, module, train


def test_pictures_at_every_nth_validation_and_the_last_and_scalars_at_all(tmp_path: Path) -> None:
    for every, steps in ((1, [3, 6]), (5, [6])):
        folder = tmp_path / str(every)
        events = train(module(), folder, DetectionCurves(every, score_threshold=0.0))
        logged = [event.step for event in events.Scalars("val_errors/missed")]
        assert len(logged) == 2
        assert [picture.step for picture in events.Images("val_curves/confusion")] == logged[-len(steps) :]
        assert events.Tags()["tensors"] and len(events.Tensors("val_precision_recall/cat")) == len(steps)
    assert not any(tag.startswith("val_") for tag in _tags(train(module(), tmp_path / "0", DetectionCurves(0))))


def _tags(events: object) -> list[str]:
    return [tag for tags in events.Tags().values() if isinstance(tags, list) for tag in tags]  # type: ignore[attr-defined]


def test_tensorboard_reads_whole_curves(tmp_path: Path) -> None:
    """Six rows: true and false positives, true and false negatives, precision, recall, by rising threshold."""
    events = train(module(), tmp_path, DetectionCurves())
    (event,) = events.Tensors("val_precision_recall/cat")
    curve = tensor_util.make_ndarray(event.tensor_proto)
    assert curve.shape == (6, len(SCORE_THRESHOLDS))
    true, false, _, lost, precision, recall = curve
    cats = sum(int((target["labels"] == 1).sum()) for target in VALIDATION)
    assert (true + lost == cats).all() and np.allclose(recall, true / cats) and (false >= 0).all()
    for column in range(len(SCORE_THRESHOLDS)):
        number = true[column] + false[column]
        assert precision[column] == pytest.approx(true[column] / number if number else 0)
    gain = events.Scalars("val_errors/missed")[-1].value
    assert math.isfinite(gain) and 0 <= gain <= 1
