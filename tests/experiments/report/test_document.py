"""`frcnn report`: a grid whose numbers were written by hand, finished or not, as JSON, CSV and table; and bad input."""

import csv
import io
import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {"name", "axes", "status", "seeds", "metrics"}


@pytest.fixture
def written(tmp_path, writer) -> Path:
    """Cells of numbers written by hand: 8 two seeds, 16 one of one, 32 failed, 64 running, 128 missing."""
    folder = tmp_path / "runs" / "written"
    cells = [writer.cell(s, n) for s, n in [("8", 0), ("8", 1), ("16", 0), ("32", 0), ("32", 1), ("64", 0), ("128", 0)]]
    writer.plan(folder, cells, paper={"scales=8": 0.658, "scales=16": 66.7}, baseline="scales=8")
    writer.run(folder, cells[0], "done", 0.5, seconds=10)
    writer.run(folder, cells[1], "done", 0.7, seconds=30)
    writer.run(folder, cells[2], "done", 0.4)
    writer.run(folder, cells[3], "done", 0.9)
    writer.run(folder, cells[4], "failed", error="Traceback\n  more\nRuntimeError: out of memory", exit_code=1)
    writer.run(folder, cells[5], "running", 0.123, host="another machine", pid=1)
    return folder


def test_mean_and_deviation_over_seeds(report, written):
    document = report(written)
    assert [set(one) >= KEYS for one in document["cells"]] == [True] * 5
    first, second, failed, running, missing = document["cells"]
    assert first["seeds"] == [0, 1]
    ap = first["metrics"]["AP50_voc07"]
    assert (ap["mean"], ap["std"]) == (pytest.approx(0.6), pytest.approx(math.sqrt(0.02)))
    assert ap["values"] == [0.5, 0.7]
    assert first["metrics"]["proposal_recall@300"]["mean"] == pytest.approx(0.3)
    assert first["seconds"] == 20
    assert second["metrics"]["AP50_voc07"] == {"mean": 0.4, "std": None, "values": [0.4]}
    # what failed or is running counts for nothing
    assert failed["metrics"]["AP50_voc07"] == {"mean": 0.9, "std": None, "values": [0.9, None]}
    assert running["metrics"]["AP50_voc07"] == missing["metrics"]["AP50_voc07"]
    assert running["metrics"]["AP50_voc07"] == {"mean": None, "std": None, "values": [None]}
    assert [one["status"] for one in document["cells"]] == ["done", "done", "failed", "running", "missing"]
    assert [one["paper"] for one in document["cells"]] == [0.658, pytest.approx(0.667), None, None, None]
    assert document["counts"] == {"done": 4, "failed": 1, "running": 1, "missing": 1}
    assert failed["runs"][1]["error"].endswith("RuntimeError: out of memory")


def test_other_metrics_and_the_other_part(report, written):
    assert report(written)["part"] == "test"
    validated = report(written, "--part", "val")
    assert validated["cells"][0]["metrics"]["AP50_voc07"]["values"] == [0.99, 0.99]
    both = report(written, "--metrics", "[AP50_voc07, val/AP50_voc07]")["cells"][0]["metrics"]
    assert (both["AP50_voc07"]["mean"], both["val/AP50_voc07"]["mean"]) == (pytest.approx(0.6), pytest.approx(0.99))
    assert "no run has it; there are AP50_voc07" in report(written, "--metrics", "[AP51]", refused=True)


def test_table(report, written):
    text = report(written, style="table")
    rows = {line.split()[0]: line for line in text.splitlines() if re.match(r"\d+ ", line)}
    assert re.search(r"2 done +0\.6000 ± 0\.1414", rows["8"])
    assert "±" not in rows["16"]
    assert "1 done, 1 failed" in rows["32"]
    assert "1 running" in rows["64"]
    assert "1 missing" in rows["128"]
    assert "7 runs: 4 done, 1 failed, 1 running, 1 missing" in text
    assert re.search(r"^failed: scales=32, seed 1: .*out of memory$", text, re.MULTILINE)


def test_csv(report, written):
    rows = list(csv.DictReader(io.StringIO(report(written, style="csv"), newline="")))
    assert [row["scales"] for row in rows] == ["8", "16", "32", "64", "128"]
    assert float(rows[0]["AP50_voc07 mean"]) == pytest.approx(0.6)
    assert float(rows[0]["AP50_voc07 std"]) == pytest.approx(math.sqrt(0.02))
    assert rows[1]["AP50_voc07 std"] == ""
    assert (rows[2]["status"], rows[2]["seeds"], rows[2]["done"]) == ("failed", "2", "1")


def test_labels_that_a_spreadsheet_takes_for_dates(report, tmp_path, writer):
    labels = ["4-8-16", "0.5-1", "8", "small", "1-2_4-8"]
    cells = [writer.cell(label, 0) for label in labels]
    writer.plan(tmp_path / "g", cells)
    rows = list(csv.DictReader(io.StringIO(report(tmp_path / "g", style="csv"), newline="")))
    assert [row["scales"] for row in rows] == ["[4-8-16]", "[0.5-1]", "8", "small", "[1-2_4-8]"]


def test_a_process_that_is_gone_is_interrupted(report, tmp_path, writer):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    cells = [writer.cell("8", 0), writer.cell("8", 1)]
    writer.plan(tmp_path / "g", cells)
    host = socket.gethostname()
    writer.run(tmp_path / "g", cells[0], "running", host=host, pid=process.pid)
    writer.run(tmp_path / "g", cells[1], "running", host=host, pid=1)
    assert [run["status"] for run in report(tmp_path / "g")["cells"][0]["runs"]] == ["interrupted", "running"]


def test_damaged_runs_do_not_stop_the_report(report, tmp_path, writer):
    folder = tmp_path / "g"
    cells = [writer.cell("8", seed) for seed in range(4)]
    writer.plan(folder, cells)
    (writer.run(folder, cells[0], "done", 0.5) / "metrics.json").write_text('{"test/AP50_voc07": 0.')
    writer.run(folder, cells[1], "done")
    (writer.run(folder, cells[2], "done", 0.5) / "cell.json").write_text("[]")
    writer.run(folder, cells[3], "done", 0.75)
    (one,) = report(folder)["cells"]
    assert [run["status"] for run in one["runs"]] == ["failed", "failed", "failed", "done"]
    errors = [run["error"] for run in one["runs"]]
    assert "cut short" in errors[0]
    assert "metrics.json is missing" in errors[1]
    assert "cell.json" in errors[2]
    assert one["metrics"]["AP50_voc07"]["values"] == [None, None, None, 0.75]


# ---- bad input ----


def test_bad_input(report, written, tmp_path):
    assert "nowhere: no such folder" in report(tmp_path / "nowhere", refused=True)
    (tmp_path / "empty").mkdir()
    assert "holds no runs" in report(tmp_path / "empty", refused=True)
    assert "--bootstrap 1" in report(written, "--bootstrap", 1, refused=True)
    assert "yaml" in report(written, "--format", "yaml", refused=True)
    assert "is a folder" in report(written, "--output", tmp_path, refused=True)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in report(written, "--output", tmp_path / "file" / "x.csv", refused=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"cells": [', "cut short"),
        ("[]", "JSON list"),
        ("{}", "names no cells"),
        ('{"cells": [{"name": "a"}]}', "cell 0 has no axes"),
    ],
)
def test_damaged_plan(report, tmp_path, text, words):
    (tmp_path / "grid.json").write_text(text)
    line = report(tmp_path, refused=True)
    assert "grid.json" in line
    assert words in line
