"""What is shown of a grid while it runs."""

import io
import json
import re

from rich.console import Console

from experiments.ablation.monitor import Monitor


def put(folder, status, seconds=0.0, attempts=1, metrics=None, step=None, error=None):
    folder.update(status=status, seconds=seconds, attempts=attempts, steps=100, error=error)
    if metrics is not None:
        (folder.path / "metrics.json").write_text(json.dumps(metrics))
    if step is not None:
        (folder.path / "cell.progress.json").write_text(json.dumps({"step": step, "val/AP50_voc07": 0.25}))


def test_a_line_for_each_change(cells):
    one, two, three = (cells.make(name) for name in ("one", "two", "three"))
    for folder in (one, two, three):
        put(folder, "pending", attempts=0)
    out = io.StringIO()
    with Monitor("grid", [one, two, three], 2, out) as monitor:
        assert out.getvalue() == ""
        put(one, "running")
        monitor.look()
        put(one, "done", 60.0, metrics={"val/AP50_voc07": 0.5, "test/AP50_voc07": 0.75})
        put(two, "running", step=40)
        monitor.look()
        monitor.look()
        put(two, "failed", 30.0, error="first\nsecond")
    assert out.getvalue().splitlines() == [
        "running: one; 0 of 3 done, 1 running",
        # 60 and 100 steps are left, of 0.6 s each, by two cells at a time
        "done: one: test/AP50_voc07 0.7500 (60 s); 1 of 3 done, 1 running, about 48 s left",
        "running: two; 1 of 3 done, 1 running, about 48 s left",
        "failed: two",
        "    first",
        "    second",
        f"    (log: {two.log})",
    ]


def test_the_table_of_a_terminal_shows_what_matters_now(cells, monkeypatch):
    monkeypatch.setenv("LINES", "13")  # room for five cells
    monkeypatch.setenv("COLUMNS", "120")
    folders = [cells.make(f"c{number}") for number in range(8)]
    put(folders[0], "done", 7200.0, metrics={"test/AP50_voc07": 0.75})
    put(folders[5], "running", step=40)
    put(folders[6], "failed", 5.0)
    put(folders[7], "interrupted", 30.0, step=20)
    console = Console(file=io.StringIO(), width=120)
    console.print(Monitor("grid", folders, 2, io.StringIO())._table())
    text = console.file.getvalue()
    rows = [re.split(r" *│ *", line.strip("│ \n")) for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["c0", "7", "done", "", "0.7500 (test)", "2.0 h"],
        ["c1", "7", "pending"],
        ["c5", "7", "running", "40/100", "0.2500 (val)"],
        ["c6", "7", "failed", "", "", "5 s"],
        ["c7", "7", "interrupted", "20/100", "0.2500 (val)", "30 s"],
    ]
    assert "(3 more cells)" in text
    assert "grid: 1 of 8 done, 1 running, 1 failed, 1 interrupted, about " in text
