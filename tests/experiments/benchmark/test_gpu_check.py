"""`make gpu`: its parts on the CPU in tiny sizes; a check that is killed leaves what was finished."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmark.gpu_check import tasks
from experiments.benchmark.gpu_check.__main__ import Part, main, run_parts, verdicts
from experiments.benchmark.gpu_check.limited import Ended, run_limited
from experiments.benchmark.gpu_check.record import Record
from experiments.benchmark.gpu_check.speed import NETWORKS, cases
from experiments.benchmark.gpu_check.tasks import Check, figures

ON_CPU = ("--accelerator", "cpu", "--quick", "--minutes", "8")


def read(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "gpu_check.json").read_text())
    return document["parts"]


def check_in(folder: Path, quick: bool = False) -> Check:
    return Check(folder, folder, None, "cpu", quick)


def test_speed_and_trace(tmp_path) -> None:
    """Of the smallest network; a second part goes on where the first stopped."""
    out = tmp_path / "out"
    assert main([*ON_CPU, "--output", str(out), "--parts", "machine", "speed", "more speed"]) == 0
    parts = read(out)
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("machine", "speed", "trace", "more speed"), "done"
    )
    rows = parts["speed"]["cases"]
    assert [(row["kind"], row["images"], row["precision"]) for row in rows] == [
        ("train", 1, "32-true"),
        ("infer", 1, "32-true"),
        ("infer", 2, "tf32"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["torchvision_ms"] / row["ours_ms"])
        assert row["images_per_s"] == pytest.approx(1000 * row["images"] / row["ours_ms"])
        assert row["times_bare_network"] > 0.5 and {"backbone", "box head"} < row["parts_ms"].keys()
    assert len(parts["speed"]["operations"]) == 4
    sizes = parts["speed"]["new sizes"]
    assert [(row["size"].split()[-1], row.get("cudnn")) for row in sizes] == [("96x128", None), ("128x160", "no")]
    for size in sizes:
        assert min(size[f"{who}_{nth}_ms"] for who in ("ours", "torchvision") for nth in ("first", "second")) > 0
    assert any(row["operator"] == "backbone" for row in parts["trace"]["by host"])
    assert (out / "trace.json.gz").stat().st_size > 1000
    text = (out / "gpu_check.md").read_text()
    assert "| mobilenet_v3_large_320_fpn train, batch 1, 32-true |" in text
    assert {path.name for path in out.iterdir()} == {"gpu_check.json", "gpu_check.md", "speed.txt", "trace.json.gz"}


@pytest.mark.slow
def test_all_parts(tmp_path) -> None:
    out = tmp_path / "out"
    assert main([*ON_CPU, "--output", str(out)]) == 0
    parts = read(out)
    wanted = {"machine", "tests", "speed", "trace", "training", "grid", "more speed"}
    assert {name for name, part in parts.items() if part["status"] == "done"} == wanted
    assert parts["tests"]["outcomes"] == {"passed": 1} and parts["tests"]["failures"] == []
    assert parts["training"]["val/AP50"] >= 0 and 0 < parts["training"]["data_wait_share"] < 1
    assert parts["grid"]["done"] == 2
    assert len(list(out.iterdir())) <= 8


def test_a_killed_check_leaves_its_finished_parts(tmp_path, wait_for) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "experiments.benchmark.gpu_check", *ON_CPU, "--output", str(out)]
    process = subprocess.Popen([*command, "--parts", "machine", "speed"], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (out / "gpu_check.json").is_file() and read(out).get("speed", {}).get("cases"), process)
    finally:
        process.kill()
        process.communicate()
    parts = read(out)
    assert parts["machine"]["status"] == "done" and parts["machine"]["torch"]
    assert parts["speed"]["status"] == "running"
    assert parts["speed"]["cases"][0]["ours_ms"] > 0
    assert "| machine | done |" in (out / "gpu_check.md").read_text()


def test_commands_end_with_their_time(tmp_path, monkeypatch) -> None:
    (tmp_path / "endless.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("experiments.benchmark.gpu_check.limited.GRACE", 1.0)
    ended = run_limited(["endless"], tmp_path / "log.txt", 2.0)
    assert (ended.code, ended.status) == (None, "cut off")
    assert 1.0 <= ended.seconds < 60
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    assert run_limited(["broken"], tmp_path / "log.txt", 60.0).values()["exit_code"] == 3


def test_parts_that_do_not_fit_are_left_out_and_errors_kept(tmp_path) -> None:
    def fails(check: Check, seconds: float) -> dict[str, Any]:
        raise ValueError(f"{seconds:.0f} s")

    record = Record(tmp_path)
    parts = [
        Part("first", 0.25, 1, lambda check, seconds: {"seconds_given": round(seconds)}),
        Part("fails", 0.5, 1, fails),
        Part("long", 1.0, 5000, fails),
    ]
    run_parts(record, check_in(tmp_path), parts, 1000)
    found = read(tmp_path)
    assert (found["first"]["status"], found["first"]["seconds_given"]) == ("done", 250)
    assert (found["fails"]["status"], found["fails"]["why"]) == ("failed", "ValueError: 500 s")
    assert found["long"]["status"] == "left out" and found["long"]["why"].endswith("it needs 5000")


def test_the_most_important_cases_come_first() -> None:
    main_cases, rest = cases(quick=False)
    first = main_cases[: 4 * len(NETWORKS)]
    assert {case.precision for case in first} == {"bf16-mixed"} and {case.images for case in first} == {1, 8}
    assert {(case.network, case.kind) for case in first} == {(n, k) for n in NETWORKS for k in ("train", "infer")}
    everything = main_cases + rest
    assert len({case.name for case in everything}) == len(everything)
    for precision in ("bf16-mixed", "tf32"):
        images = [case.images for case in everything if case.precision == precision and not case.compiled]
        assert sorted(images) == sorted(4 * 2 * [1, 2, 8, 16])


def row(network: str, kind: str, images: int, ours: float, theirs: float) -> dict[str, Any]:
    rates = {"images_per_s": 1000 * images / ours, "torchvision_images_per_s": 1000 * images / theirs}
    return {
        **{"name": f"{network} {kind} {images}", "network": network, "kind": kind, "images": images},
        **{"precision": "bf16-mixed", "ratio": theirs / ours, **rates},
    }


def test_verdicts() -> None:
    """1 image in 10 ms against 9, 8 in 20 ms against 30: the best batches are 400 and 267 images per second."""
    cases = [row("vgg16", "train", 1, 10, 9), row("vgg16", "train", 8, 20, 30)]
    parts = {
        "tests": {"status": "done", "outcomes": {"passed": 20, "failed": 1}},
        "speed": {"status": "done", "cases": cases},
        "training": {"status": "done", "data": "VOC2012 subset", "val/AP50": 0.55, "data_wait_share": 0.06},
    }
    assert [(row["found"], row["met"]) for row in verdicts(parts)] == [
        ({"passed": 20, "failed": 1}, "NO"),
        (1.5, "yes"),
        ("0.90 (vgg16 train 1)", "NO"),
        (0.55, "yes"),
        (0.06, "NO"),
    ]


def test_outcomes_of_tests_are_read_as_far_as_they_came(tmp_path, monkeypatch) -> None:
    def run(arguments: Any, log: Path, *_: Any) -> Any:
        log.write_text(
            "tests/a.py::test_x[a b] PASSED   [ 10%]\ntests/a.py::test_y FAILED   [ 20%]\ntests/a.py::test_z "
            "\nFAILED tests/a.py::test_y - assert 1 == 2\n"
        )
        return Ended(None, 3.0, {})

    monkeypatch.setattr(tasks, "run_limited", run)
    found = tasks.tests(check_in(tmp_path), 60)
    assert found["outcomes"] == {"passed": 1, "failed": 1}
    assert found["failures"] == ["tests/a.py::test_y - assert 1 == 2"]
    assert found["status"] == "cut off"


def test_figures_of_a_run(trained, metrics_of) -> None:
    """Validated after epochs 7 and 14."""
    found = figures(trained)
    assert list(found["val/AP50_voc07 by epoch"]) == ["7:", "14:"]
    assert found["val/AP50_voc07"] == pytest.approx(metrics_of(trained)["val/AP50_voc07"])
    assert 0 < found["data_wait_share"] < 1 and found["images_per_second"] > 0


def test_a_check_is_not_overwritten(tmp_path, capsys) -> None:
    (tmp_path / "gpu_check.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path)])
    assert ended.value.code == 2
    assert "holds a check already" in capsys.readouterr().err


def test_termination_while_a_part_is_started_ends_everything(tmp_path) -> None:
    """What a handler raises in the hooks of a fork, Python drops."""
    program = (
        "import os, signal, sys\n"
        "from experiments.benchmark.gpu_check.__main__ import main\n"
        "os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGTERM))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *ON_CPU, "--output", str(tmp_path / "out"), "--parts", "speed"]
    assert subprocess.run(command, timeout=60, capture_output=True).returncode == 128 + signal.SIGTERM
    assert read(tmp_path / "out")["speed"]["status"] == "running"


def test_termination_ends_everything(tmp_path, wait_for) -> None:
    command = [sys.executable, "-m", "experiments.benchmark.gpu_check", "--accelerator", "cpu"]
    command += ["--output", str(tmp_path)]
    process = subprocess.Popen([*command, "--parts", "speed"], stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: (tmp_path / "speed.txt").is_file(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert read(tmp_path)["speed"]["status"] == "running"
