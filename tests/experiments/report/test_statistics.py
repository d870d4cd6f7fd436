"""What `frcnn report` counts, and how it says so: repeats of seeds, options that differ, rows that were not tested,
recalls of as many proposals as there are, all over runs whose numbers were written by hand."""

import csv
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.report.text import text_table
from experiments.results.runs import read_folder

GRID = [([8], [1]), ([8], [0.5]), ([16], [1]), ([16], [0.5])]
LONE = {"trainer.max_epochs": 3, "model.roi.samples_per_image": 8, "model.optimizer.lr": 0.1, "data.batch_size": 9}


def write_run(folder: Path, seed: int, metrics: dict[str, Any] | None, **options: Any) -> Path:
    """An ordinary run: a.b.c=value of its config.yaml, and its metrics.json, if it is finished."""
    config: dict[str, Any] = {"seed_everything": seed, "experiment": "x", "run_name": folder.name}
    values = {"model.anchors.scales": [8], "trainer.max_epochs": 12, "model.rpn.post_nms_test": 300} | options
    for key, value in values.items():
        *parents, last = key.split(".")
        inner = config
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "checkpoints").mkdir()
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps({"seed": seed} | metrics))
    return folder


def ap(value: float, part: str = "val") -> dict[str, float]:
    return {f"{part}/AP50_voc07": value}


# ---- one seed, one run ----


def test_a_repeated_seed_counts_once(report, tmp_path):
    for name, seed, value in (("a", 0, 0.25), ("b", 0, 0.75), ("c", 1, 0.35)):
        write_run(tmp_path / "runs" / name, seed, ap(value))
    document = report(tmp_path / "runs")
    (cell,) = document["cells"]
    assert cell["seeds"] == [0, 1]
    metric = cell["metrics"]["AP50_voc07"]
    assert metric["values"] == [0.25, 0.35]
    assert (metric["mean"], metric["std"]) == (pytest.approx(0.3), pytest.approx(0.1 / math.sqrt(2)))
    assert [Path(run["folder"]).name for run in cell["repeats"]] == ["b"]
    assert document["counts"] == {"done": 2}
    assert document["notes"][0] == "x: b repeats seed 0 of a, with +0.5000 in val/AP50_voc07: not counted"
    text = report(tmp_path / "runs", style="table")
    assert "1 cells, 2 runs: 2 done; 1 more repeat a seed" in text
    assert re.search(r"2 done \(\+ 1 repeated\) +0\.3000 ± 0\.0707", text)


def test_a_seed_alone_has_no_deviation_however_often_it_was_run(report, tmp_path):
    for name in ("a", "b", "c"):
        write_run(tmp_path / "runs" / name, 0, ap(0.25))
    (cell,) = report(tmp_path / "runs")["cells"]
    assert cell["metrics"]["AP50_voc07"] == {"mean": 0.25, "std": None, "values": [0.25]}
    assert len(cell["repeats"]) == 2
    assert "±" not in report(tmp_path / "runs", style="table").split("(val metrics")[0]


def test_of_one_seed_a_finished_then_a_tested_then_the_first_run_counts(tmp_path):
    write_run(tmp_path / "a", 0, None)
    write_run(tmp_path / "b", 0, ap(0.1))
    for name, started in (("c", 20), ("d", 10)):
        run = write_run(tmp_path / name, 0, ap(0.2) | ap(0.3, "test"))
        (run / f"events.out.tfevents.17000000{started}.host.1.0").touch()
    (cell,) = read_folder(tmp_path).cells
    assert [run.folder.name for run in cell.runs] == ["d"]
    assert [(run.folder.name, instead.folder.name) for run, instead in cell.repeats] == [
        ("a", "d"), ("b", "d"), ("c", "d")
    ]  # fmt: skip


def test_runs_of_unknown_seed_repeat_nothing(tmp_path):
    for name in ("a", "b"):
        run = write_run(tmp_path / name, 0, None)
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"seed_everything": True}))
    (cell,) = read_folder(tmp_path).cells
    assert ([run.seed for run in cell.runs], cell.repeats) == ([None, None], ())


def test_numbers_of_some_classes_are_not_averaged_with_those_of_all(report, tmp_path):
    write_run(tmp_path / "runs" / "a", 0, ap(0.2))
    write_run(tmp_path / "runs" / "b", 1, ap(0.8) | {"classes": ["star"]})
    document = report(tmp_path / "runs")
    found = {cell["axes"]["classes"]: cell["metrics"]["AP50_voc07"]["mean"] for cell in document["cells"]}
    assert found == {"none": 0.2, '["star"]': 0.8}
    assert 'metrics of some classes alone: b ["star"]' in document["notes"]


# ---- options that differ are columns ----


@pytest.fixture
def grid_and_lone_run(tmp_path) -> Path:
    """Scales by ratios, and one run that differs from them in four more options."""
    for number, (scales, ratios) in enumerate(GRID):
        options = {"model.anchors.scales": scales, "model.anchors.aspect_ratios": ratios}
        write_run(tmp_path / "runs" / f"g{number}", 0, ap(0.1 * (number + 1)), **options)
    lone = {"model.anchors.scales": [8], "model.anchors.aspect_ratios": [1]} | LONE
    write_run(tmp_path / "runs" / "lone", 0, ap(0.9), **lone)
    return tmp_path / "runs"


def test_a_lone_run_takes_no_column_away(report, grid_and_lone_run):
    document = report(grid_and_lone_run)
    assert set(document["axes"]) == {"model.anchors.scales", "model.anchors.aspect_ratios", *LONE}
    found = {one["name"]: one for one in document["cells"]}
    assert set(found) == {
        "x: aspect_ratios=[1], scales=[8], batch_size=9",
        "x: aspect_ratios=[1], scales=[8], batch_size=none",
        "x: aspect_ratios=[0.5], scales=[8], batch_size=none",
        "x: aspect_ratios=[1], scales=[16], batch_size=none",
        "x: aspect_ratios=[0.5], scales=[16], batch_size=none",
    }
    assert found["x: aspect_ratios=[0.5], scales=[16], batch_size=none"]["axes"]["trainer.max_epochs"] == "12"
    rows = list(csv.DictReader(io.StringIO(report(grid_and_lone_run, style="csv"), newline="")))
    assert [row["model.anchors.scales"] for row in rows] == ["[8]", "[8]", "[16]", "[16]", "[8]"]
    header = report(grid_and_lone_run, style="table").splitlines()[2].split()
    assert header[:5] == ["aspect_ratios", "scales", "batch_size", "runs", "AP50_voc07"]  # which tell the rows apart
    assert header[-3:] == ["lr", "samples_per_image", "max_epochs"]


def test_the_map_is_of_the_grid_alone(report, grid_and_lone_run):
    (page,) = re.findall(r"<h2>AP50_voc07 over aspect_ratios and scales</h2>.*?</table>", report(
        grid_and_lone_run, style="html"), re.DOTALL)  # fmt: skip
    assert re.findall(r">(0\.\d{4})", page) == ["0.1000", "0.3000", "0.2000", "0.4000"]
    assert "not in the grid" not in page


@pytest.mark.parametrize(("width", "is_terminal"), [(60, True), (100, True), (80, False)])
def test_a_table_that_is_wider_than_columns_goes_on_below(report, grid_and_lone_run, monkeypatch, width, is_terminal):
    document = report(grid_and_lone_run)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setitem(os.environ, "COLUMNS", str(width))
    lines = text_table(document).splitlines()
    assert max(len(line) for line in lines) <= width
    tables = [line for line in lines if line.startswith("row ")]
    assert len(tables) > 1
    for row in range(1, 6):
        assert len([line for line in lines if re.match(rf" *{row} ", line)]) == len(tables)
    assert "samples_per_image" in " ".join(tables)


# ---- rows that were not tested ----


@pytest.fixture
def partly_tested(tmp_path, writer) -> Path:
    """The cells 8 and 16 were tested; 32 was validated only, and so was one of two seeds of 16."""
    folder = tmp_path / "runs" / "g"
    cells = [writer.cell(scales, seed) for scales, seed in (("8", 0), ("16", 0), ("16", 1), ("32", 0), ("32", 1))]
    writer.plan(folder, cells, baseline="scales=8")
    for cell, metrics in zip(
        cells,
        (
            ap(0.5) | ap(0.4, "test"),
            ap(0.7) | ap(0.6, "test"),
            ap(0.9),
            ap(0.2) | {"val/proposal_recall@300": 0.1},
            ap(0.4) | {"val/proposal_recall@300": 0.3},
        ),
        strict=True,
    ):
        (writer.run(folder, cell, "done") / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_a_row_without_test_shows_its_validation_marked(report, partly_tested):
    document = report(partly_tested, "--bootstrap", 0)
    assert document["part"] == "test"
    assert [cell["part"] for cell in document["cells"]] == ["test", "test", "val"]
    metrics = [cell["metrics"]["AP50_voc07"] for cell in document["cells"]]
    assert [one["mean"] for one in metrics] == [0.4, 0.6, pytest.approx(0.3)]
    assert metrics[1]["values"] == [0.6, None]  # tests and validations are not averaged
    assert document["cells"][2]["metrics"]["proposal_recall@300"]["mean"] == pytest.approx(0.2)
    text = report(partly_tested, "--bootstrap", 0, style="table")
    assert re.search(r"^32 +2 done +val 0\.3000 ± 0\.1414 ", text, re.MULTILINE)
    assert re.search(r"^8 +1 done +0\.4000 ", text, re.MULTILINE)
    assert "(val: validation metrics, of rows that were not tested" in text
    rows = list(csv.DictReader(io.StringIO(report(partly_tested, "--bootstrap", 0, style="csv"), newline="")))
    assert [row["part"] for row in rows] == ["test", "test", "val"]
    assert float(rows[2]["AP50_voc07 mean"]) == pytest.approx(0.3)
    row = re.findall(r"<td[^>]*>[^<]*0\.3000 ± 0\.1414", report(partly_tested, "--bootstrap", 0, style="html"))
    assert ["style" in cell for cell in row] == [False]


def test_a_part_that_is_asked_for_is_the_part_of_all_rows(report, partly_tested):
    tested = report(partly_tested, "--part", "test", "--bootstrap", 0)["cells"]
    assert [cell["metrics"]["AP50_voc07"]["mean"] for cell in tested] == [0.4, 0.6, None]
    validated = report(partly_tested, "--part", "val", "--bootstrap", 0)["cells"]
    assert [cell["metrics"]["AP50_voc07"]["mean"] for cell in validated] == [0.5, 0.8, pytest.approx(0.3)]
    assert "(val:" not in report(partly_tested, "--part", "val", "--bootstrap", 0, style="table")


def test_runs_beside_a_planned_grid_are_said_to_be_left_out(report, partly_tested):
    assert not [note for note in report(partly_tested, "--bootstrap", 0)["notes"] if "not counted" in note]
    write_run(partly_tested / "again", 0, ap(0.9))
    document = report(partly_tested, "--bootstrap", 0)
    assert "no cells of the grid, and not counted: again" in document["notes"]
    assert sum(document["counts"].values()) == 5


# ---- recall of proposals ----


def recalls(*values: float) -> dict[str, float]:
    names = (50, 100, 300, 1000, 2000)
    return ap(0.5) | {f"val/proposal_recall@{k}": value for k, value in zip(names, values, strict=True)}


@pytest.mark.parametrize(
    ("most", "values", "shown"),
    [
        ([150], [(0.1, 0.2, 0.3, 0.3, 0.3)], {"proposal_recall@150": [0.3]}),
        ([300], [(0.1, 0.2, 0.3, 0.3, 0.3)], {"proposal_recall@300": [0.3]}),
        ([1000], [(0.1, 0.2, 0.3, 0.4, 0.4)], {"proposal_recall@300": [0.3]}),
        ([30], [(0.1, 0.1, 0.1, 0.1, 0.1)], {"proposal_recall@30": [0.1]}),
        # what all have
        ([150, 300], [(0.1, 0.2, 0.3, 0.3, 0.3), (0.2, 0.4, 0.6, 0.6, 0.6)], {"proposal_recall@100": [0.2, 0.4]}),
        # evaluated with 2000, whatever the training had
        ([150], [(0.1, 0.2, 0.3, 0.4, 0.5)], {"proposal_recall@300": [0.3]}),
    ],
)
def test_recall_of_as_many_proposals_as_there_are(report, tmp_path, most, values, shown):
    for number, (limit, of_run) in enumerate(zip(most, values, strict=True)):
        options = {"model.rpn.post_nms_test": limit}
        write_run(tmp_path / "runs" / str(number), 0, recalls(*of_run), **options)
    cells = report(tmp_path / "runs")["cells"]
    found = {name: [cell["metrics"][name]["mean"] for cell in cells] for name in cells[0]["metrics"]}
    assert found == {"AP50_voc07": [0.5] * len(most)} | shown


def test_recall_of_more_proposals_than_there_are_is_no_metric(report, tmp_path):
    options = {"model.rpn.post_nms_test": 150}
    write_run(tmp_path / "runs" / "a", 0, recalls(0.1, 0.2, 0.3, 0.3, 0.3), **options)
    line = report(tmp_path / "runs", "--metrics", "[proposal_recall@300]", refused=True)
    assert line.endswith("there are AP50_voc07, proposal_recall@100, proposal_recall@150, proposal_recall@50\n")


def test_unfinished_runs_are_headed_by_what_they_can_reach(report, tmp_path):
    options = {"model.rpn.post_nms_test": 120}
    write_run(tmp_path / "runs" / "a", 0, None, **options)
    (cell,) = report(tmp_path / "runs")["cells"]
    assert list(cell["metrics"]) == ["AP50_voc07", "proposal_recall@120"]
