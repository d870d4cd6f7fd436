"""Curves that are read from TensorBoard's files."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from detector.training.loggers import RunTensorBoard
from experiments.results.curves import read_curves

DAY = 86_400


@pytest.mark.parametrize("jump", [-400 * DAY, 0, 0.5])
def test_sessions_are_read_in_their_order_whatever_the_clock(tmp_path, monkeypatch, jump):
    """A clock that was ahead is put right before the training goes on; or both sessions begin in one second."""
    for session, now in enumerate((1.8e9, 1.8e9 + jump)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        logger = RunTensorBoard(str(tmp_path), "", "")
        for step in range(2 * session, 2 * session + 4):
            logger.log_metrics({"loss": session}, step)
        logger.experiment.close()
    assert [path.name.split(".")[3] for path in sorted(tmp_path.iterdir())] == ["1800000000", "1800000001"]
    curve = read_curves(tmp_path, ["loss"])["loss"]
    assert (curve.steps, curve.values) == ((0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 1, 1))


def test_a_clock_that_jumps_back_changes_no_order(tmp_path):
    """Of a step that was repeated the value counts that was written last, whatever the time."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value, time in ((0, 1.0, 4e9), (1, 2.0, 4e9), (1, 3.0, 10.0), (2, 4.0, 2e9)):
            writer.add_scalar("loss", value, step, walltime=time)
    curve = read_curves(tmp_path, ["loss"])["loss"]
    assert (curve.steps, curve.values) == ((0, 1, 2), (1.0, 3.0, 4.0))
