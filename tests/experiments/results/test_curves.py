"""Curves that are read from TensorBoard's files."""

from torch.utils.tensorboard import SummaryWriter

from experiments.results.curves import read_curves


def test_a_clock_that_jumps_back_changes_no_order(tmp_path):
    """Of a step that was repeated the value counts that was written last, whatever the time."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value, time in ((0, 1.0, 4e9), (1, 2.0, 4e9), (1, 3.0, 10.0), (2, 4.0, 2e9)):
            writer.add_scalar("loss", value, step, walltime=time)
    curve = read_curves(tmp_path, ["loss"])["loss"]
    assert (curve.steps, curve.values) == ((0, 1, 2), (1.0, 3.0, 4.0))
