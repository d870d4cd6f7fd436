"""Mean and spread over seeds in TensorBoard, of curves with numbers by hand."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

AP = "val/AP50_voc07"


def log(run: Path, tag: str, curve: dict[int, float]) -> None:
    with SummaryWriter(str(run)) as events:
        for step, value in curve.items():
            events.add_scalar(tag, value, step)


@pytest.fixture
def grid(tmp_path, writer) -> Path:
    """Of `8` two seeds are done and a third runs; of `16` two run; of `32` there is one."""
    folder = tmp_path / "runs" / "written"
    cells = [writer.cell(s, n) for s, n in [("8", 0), ("8", 1), ("8", 2), ("16", 0), ("16", 1), ("32", 0)]]
    writer.plan(folder, cells)
    for cell, status in zip(cells, ["done", "done", "running", "running", "running", "done"], strict=True):
        value = 0.5 if status == "done" else None
        writer.run(folder, cell, status, value, host="another machine", pid=1)
    values = [{9: 0.25, 19: 0.5}, {9: 0.75, 19: 0.5, 29: 0.9}, {9: 0.1}, {9: 0.0}, {9: 0.25}, {9: 1.0}]
    for cell, curve in zip(cells, values, strict=True):
        log(folder / cell["folder"], AP, curve)
    return folder


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run)).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_mean_and_deviation_at_the_steps_of_all_seeds(frcnn, grid, tmp_path) -> None:
    for _ in range(2):  # the second time replaces what the first one wrote
        result = frcnn("report", grid, "--tensorboard", "--format", "json", cwd=tmp_path)
        assert result.code == 0, result.err
        assert f"{grid / 'over_seeds'}: mean and spread of 2 rows of several seeds\n" in result.err
    runs = sorted((grid / "over_seeds").iterdir())
    assert [run.name for run in runs] == ["scales=16", "scales=8"]
    assert all(len(list(run.iterdir())) == 1 for run in runs)
    deviation = 0.5 / 2**0.5
    edges = [f"val_over_seeds/AP50_voc07_{edge}" for edge in ("less", "more")]
    found = curves(runs[1])
    assert set(found) == {AP, *edges}
    assert found[AP] == [(9, 0.5), (19, 0.5)]
    assert found[edges[0]] == [(9, pytest.approx(0.5 - deviation)), (19, 0.5)]
    assert found[edges[1]] == [(9, pytest.approx(0.5 + deviation)), (19, 0.5)]
    assert curves(runs[0])[AP] == [(9, 0.125)], "none is done: of those that run"


def test_charts_name_the_curves(frcnn, grid, tmp_path) -> None:
    assert frcnn("report", grid, "--tensorboard", cwd=tmp_path).code == 0
    events = EventAccumulator(str(grid / "over_seeds" / "scales=8")).Reload()
    (written,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    (chart,) = [chart for page in layout.category for chart in page.chart if chart.title == AP]
    (series,) = chart.margin.series
    assert {series.value, series.lower, series.upper} == set(events.Tags()["scalars"])
    assert (series.lower, series.upper) == ("val_over_seeds/AP50_voc07_less", "val_over_seeds/AP50_voc07_more")


def test_nothing_is_written_unless_it_is_asked_for(report, grid) -> None:
    before = report(grid)
    assert not (grid / "over_seeds").exists()
    report(grid, "--tensorboard")
    assert report(grid) == before, "what was written is no run"
