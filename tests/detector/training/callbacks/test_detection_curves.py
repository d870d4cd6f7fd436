"""Curves at chosen validations, as TensorBoard reads them."""

import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from tensorboard.util import tensor_util

from detector.metrics.curves import SCORE_THRESHOLDS
from detector.training.callbacks.detection_curves import DetectionCurves
from tests.detector.training.callbacks.test_anchor_telemetry import VALIDATION, module, train


class Stop(pl.Callback):
    """Ends a training before anybody knows."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("every", "others", "steps"), [(1, [], [2, 5, 8]), (5, [], [2, 8]), (None, [], [2, 8]), (5, [Stop()], [2, 5])]
)
def test_pictures_at_some_validations_and_scalars_at_all(tmp_path: Path, every, others, steps) -> None:
    events = train(module(), tmp_path, DetectionCurves(every, score_threshold=0.0), *others, epochs=3)
    assert [event.step for event in events.Scalars("val_errors/missed")] == [2, 5, 8][: 2 if others else 3]
    assert [picture.step for picture in events.Images("val_curves/confusion")] == steps
    assert [event.step for event in events.Tensors("val_precision_recall/cat")] == steps


def test_nothing_where_it_is_turned_off(tmp_path: Path) -> None:
    assert not any(tag.startswith("val_") for tag in _tags(train(module(), tmp_path, DetectionCurves(0))))


def _tags(events: object) -> list[str]:
    return [tag for tags in events.Tags().values() if isinstance(tags, list) for tag in tags]  # type: ignore[attr-defined]


def test_tensorboard_reads_whole_curves(tmp_path: Path) -> None:
    """Six rows: true and false positives, true and false negatives, precision, recall, by rising threshold."""
    events = train(module(), tmp_path, DetectionCurves())
    *_, event = events.Tensors("val_precision_recall/cat")
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
