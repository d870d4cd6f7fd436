"""`frcnn ablate` on the smallest detector: an undisturbed grid, and the same grid killed and run again."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

FIRST, SECOND, BAD = "scales=1,weights=none,seed=5", "scales=1-2,weights=none,seed=5", "scales=1,weights=absent,seed=5"


@pytest.fixture(scope="module")
def undisturbed(frcnn, grid, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The working folder, and what `--format json` printed."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    result = frcnn("ablate", grid, "--format", "json", cwd=cwd)
    assert result.code == 1, result.err
    assert f"failed: {BAD}" in result.err
    return cwd, json.loads(result.out)


def cell_folders(cwd: Path) -> dict[str, Path]:
    document = json.loads((cwd / "runs" / "small" / "grid.json").read_text())
    return {cell["name"]: cwd / "runs" / "small" / cell["folder"] for cell in document["cells"]}


def state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "cell.json").read_text())
    return content


def results(folder: Path) -> tuple[dict[str, Any], Any]:
    """Everything but the speed."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("train/images_per_second", None)
    return metrics, json.loads((folder / "predictions.json").read_text())


def test_cells_of_two_devices_each(frcnn, tiny_config, tmp_path):
    """The forked cell starts its second process by the whole command; three steps an epoch instead of six."""
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_epochs": 1, "trainer.limit_val_batches": 0}
    content = {"base": str(tiny_config), "overrides": two | {"data.test_splits": []}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    result = frcnn("ablate", "two.yaml", "--format", "json", cwd=tmp_path)
    assert result.code == 0, result.err + "".join(path.read_text() for path in tmp_path.glob("runs/two/*/cell.log"))
    (cell,) = json.loads(result.out)["cells"]
    assert (cell["status"], cell["attempts"], cell["steps"], cell["metrics"]["step"]) == ("done", 1, 3, 3)
    assert "Starting with 2 processes" in (tmp_path / "runs" / "two" / cell["folder"] / "cell.log").read_text()


# ---- an undisturbed grid ----


def test_folders_hold_ordinary_runs(undisturbed):
    folder = cell_folders(undisturbed[0])[SECOND]
    assert folder.name == f"{SECOND}-{state(folder)['hash'][:8]}"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "checkpoints", "metrics.json", "predictions.json", "cell.json", "cell.log"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["model"]["anchors"]["scales"], saved["seed_everything"]) == ([1.0, 2.0], 5)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["epoch"], metrics["seed"], metrics["test_count"]) == (6, 5, 1)
    assert metrics["val/AP50_voc07"] > 0  # or the comparisons below would compare nothing
    assert "test/AP50_voc07" in metrics


def test_grid_json_and_cell_json(undisturbed):
    cwd, document = undisturbed
    written = json.loads((cwd / "runs" / "small" / "grid.json").read_text())
    assert written["axes"] == {"scales": ["1", "1-2"], "weights": ["none", "absent"]}
    assert (written["seeds"], written["baseline"]) == ([5], "scales=1,weights=none")
    assert written["paper"] == {"scales=1-2,weights=none": 0.5}
    assert [cell["name"] for cell in written["cells"]] == [FIRST, BAD, SECOND]
    assert written["cells"][2]["axes"] == {"scales": "1-2", "weights": "none"}
    folders = cell_folders(cwd)
    done = state(folders[FIRST])
    assert (done["status"], done["attempts"], done["exit_code"], done["steps"]) == ("done", 1, 0, 36)
    assert [cell["status"] for cell in document["cells"]] == ["done", "failed", "done"]
    assert document["cells"][0]["metrics"] == json.loads((folders[FIRST] / "metrics.json").read_text())


def test_a_failed_cell_is_named_with_the_end_of_its_log(undisturbed):
    failed = state(cell_folders(undisturbed[0])[BAD])
    assert (failed["status"], failed["exit_code"]) == ("failed", 2)
    assert "absent.pth" in failed["error"]
    assert "Traceback" not in failed["error"]


def test_hyperparameters_have_the_axes_as_columns(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = cell_folders(undisturbed[0])[SECOND]
    first = min(folder.glob("events.out.tfevents*"))
    content = EventAccumulator(str(first)).Reload().PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    assert values == {"Axis/scales": "1-2", "Axis/weights": "none", "seed": 5}


def test_dry_run_prints_commands_that_give_the_same_numbers(frcnn, grid, undisturbed, tmp_path):
    dry = frcnn("ablate", grid, "--dry-run", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert "3 cells (scales 2 x weights 2 x seeds 1, 1 combinations left out), 108 training steps" in dry.err
    assert not (tmp_path / "runs").exists()
    commands = [line for line in dry.out.splitlines() if not line.startswith("#")]
    theirs = cell_folders(undisturbed[0])
    assert " && ".join(commands[4:]) == state(theirs[SECOND])["command"]
    for command in commands[4:]:
        program, *arguments = shlex.split(command)
        assert program == "frcnn"
        assert frcnn(*arguments, cwd=tmp_path).code == 0
    ours = tmp_path / "runs" / "small" / theirs[SECOND].name
    assert results(ours) == results(theirs[SECOND])


def test_the_same_command_again_retries_only_what_failed(frcnn, grid, undisturbed):
    cwd, _ = undisturbed
    before = {
        name: (path / "metrics.json").stat().st_mtime_ns for name, path in cell_folders(cwd).items() if name != BAD
    }
    again = frcnn("ablate", grid, cwd=cwd)
    assert again.code == 1
    assert "0.5000" not in again.out.splitlines()[0]
    assert again.out.count(f"failed: {BAD}") == 2  # at once, and at the end
    assert "0.500" in again.out  # the paper's
    after = cell_folders(cwd)
    assert {name: (after[name] / "metrics.json").stat().st_mtime_ns for name in before} == before
    assert {name: state(path)["attempts"] for name, path in after.items()} == {FIRST: 1, SECOND: 1, BAD: 2}


# ---- killed ----


@pytest.fixture
def start(process_group) -> Callable[[Path, Path], "subprocess.Popen[str]"]:
    """`start(grid, cwd)`: `frcnn ablate` as a process group of its own, which does not outlive the test."""
    return lambda grid, cwd: process_group(["-m", "experiments.cli", "ablate", grid], cwd=cwd)


def in_the_second_cell(cwd: Path) -> bool:
    return any((cwd / "runs" / "small").glob("scales=1-2*/checkpoints/last.ckpt"))


def assert_same_grid(cwd: Path, undisturbed: Path) -> None:
    ours, theirs = cell_folders(cwd), cell_folders(undisturbed)
    for name in (FIRST, SECOND):
        assert ours[name].name == theirs[name].name
        assert results(ours[name]) == results(theirs[name])


@pytest.mark.timeout(1200)
def test_sigkill_of_the_process_group_in_the_middle_of_a_cell(frcnn, start, grid, undisturbed, tmp_path, wait_for):
    process = start(grid, tmp_path)
    wait_for(lambda: in_the_second_cell(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    folders = cell_folders(tmp_path)
    assert {name: state(path)["status"] for name, path in folders.items()} == {
        FIRST: "done",
        BAD: "failed",
        SECOND: "running",
    }
    assert not (folders[SECOND] / "metrics.json").exists()
    finished = (folders[FIRST] / "metrics.json").stat().st_mtime_ns
    assert frcnn("ablate", grid, cwd=tmp_path).code == 1
    assert (folders[FIRST] / "metrics.json").stat().st_mtime_ns == finished
    assert {name: state(path)["attempts"] for name, path in folders.items()} == {FIRST: 1, BAD: 2, SECOND: 2}
    assert (folders[SECOND] / "config_resumed_1.yaml").is_file()  # went on, from a checkpoint
    assert_same_grid(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_gentle_stop_in_the_middle_of_a_cell(frcnn, start, grid, undisturbed, tmp_path, number, code, wait_for):
    process = start(grid, tmp_path)
    wait_for(lambda: in_the_second_cell(tmp_path), process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=900)
    assert process.returncode == code
    assert "the same command goes on from here" in err
    assert "Traceback" not in err
    second = cell_folders(tmp_path)[SECOND]
    assert state(second)["status"] == "interrupted"
    assert "To go on: give ckpt_path" in (second / "cell.log").read_text()
    assert frcnn("ablate", grid, cwd=tmp_path).code == 1
    assert_same_grid(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_data_workers_fail_their_cell_alone(start, tiny_config, tmp_path, wait_for):
    options = {"trainer.max_epochs": 3, "trainer.limit_val_batches": 0, "data.num_workers": 1, "data.test_splits": []}
    content = {"base": str(tiny_config), "axes": {"model.anchors.scales": [[1], [1, 2]]}, "overrides": options}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    process = start(tmp_path / "small.yaml", tmp_path)
    wait_for(lambda: any((tmp_path / "runs" / "small").glob("scales=1,*/checkpoints/last.ckpt")), process)
    first, second = cell_folders(tmp_path).values()

    def failed() -> bool:
        """Kill what there is of workers, of the group that the cell leads; nobody misses them until the next batch."""
        if state(first)["status"] != "running":
            return True
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                group = os.getpgid(int(path.name))
                if os.getsid(group) == process.pid != group != int(path.name):
                    os.kill(int(path.name), signal.SIGKILL)
        return False

    wait_for(failed, process)
    assert state(first)["status"] == "failed"
    line = state(first)["error"].splitlines()[-1]
    assert re.fullmatch(
        r"frcnn: a data worker \(process [\d, ]+\) (was killed|ended unexpectedly).* data.num_workers", line
    )
    _, err = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "Traceback" not in err + state(first)["error"]
    assert [state(cell)["status"] for cell in (first, second)] == ["failed", "done"]
    again = start(tmp_path / "small.yaml", tmp_path)
    assert again.communicate(timeout=900) and again.returncode == 0
    assert [(state(cell)["status"], state(cell)["attempts"]) for cell in (first, second)] == [("done", 2), ("done", 1)]
    assert (first / "config_resumed_1.yaml").is_file()  # went on, from a checkpoint


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_at_once(start, grid, undisturbed, tmp_path):
    processes = [start(grid, tmp_path) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=900)
        assert process.returncode == 1
    assert all(state(path)["attempts"] == 1 for path in cell_folders(tmp_path).values())
    assert_same_grid(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_full_disk(start, grid, undisturbed, tmp_path):
    """A tmpfs that holds the checkpoints of one cell: one line, checkpoints whole, and room lets it go on."""
    disk = tmp_path / "runs"
    disk.mkdir()
    size = sum(path.stat().st_size for path in cell_folders(undisturbed[0])[FIRST].rglob("*"))
    options = f"size={int(1.5 * size)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=False).returncode != 0:
        pytest.skip("no tmpfs can be mounted")
    try:
        process = start(grid, tmp_path)
        out, err = process.communicate(timeout=900)
        assert process.returncode in (1, 2)
        assert "No space left on device" in out + err
        assert "Traceback" not in out + err
        assert not list(disk.rglob("*.partial"))
        assert subprocess.run(["mount", "-o", "remount,size=1g", disk], check=False).returncode == 0
        process = start(grid, tmp_path)
        process.communicate(timeout=900)
        assert process.returncode == 1
        assert_same_grid(tmp_path, undisturbed[0])
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- an evaluation without a training ----


def test_evaluation_of_one_checkpoint(frcnn, trained, tmp_path):
    before = (trained / "metrics.json").read_text()
    path = tmp_path / "proposals.yaml"
    content = {
        "evaluate": str(trained / "checkpoints" / "last.ckpt"),
        "axes": {"proposals": {"option": "model.rpn.post_nms_test", "values": [3, 30]}},
        "overrides": {"data.test_splits": []},
    }
    path.write_text(yaml.safe_dump(content))
    result = frcnn("ablate", path, "--format", "json", cwd=tmp_path)
    assert result.code == 0, result.err
    few, many = (cell["metrics"] for cell in json.loads(result.out)["cells"])
    assert few["val/proposal_recall@3"] < many["val/proposal_recall@30"]
    assert many["val/AP50_voc07"] == json.loads(before)["val/AP50_voc07"]  # 30 is its own
    assert (trained / "metrics.json").read_text() == before
