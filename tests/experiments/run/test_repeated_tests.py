"""A run that is tested more than once says so, and keeps all its numbers; the devkit's files of a test."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may add to."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))


def test_second_test_is_counted_and_announced(frcnn, run_folder, metrics_of, tmp_path) -> None:
    command = ("test", "--ckpt_path", run_folder / "checkpoints" / "last.ckpt")
    first = frcnn(*command, cwd=tmp_path)
    assert first.code == 0, first.err
    assert "warning: " not in first.err
    once = metrics_of(run_folder)
    assert once["test_count"] == 1
    assert once["test_history"] == []
    assert once["test_checkpoint"].endswith("checkpoints/last.ckpt")
    second = frcnn(*command, "--data.test_splits", "[val]", cwd=tmp_path)
    lines = [line for line in second.err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert "has been tested 1 time before" in lines[0]
    assert f"{once['test/AP50_voc07']:.4f}" in lines[0]
    frcnn(*command, cwd=tmp_path)
    thrice = metrics_of(run_folder)
    assert thrice["test_count"] == 3
    assert len(thrice["test_history"]) == 2
    assert thrice["test_history"][0]["test/AP50_voc07"] == once["test/AP50_voc07"]
    assert thrice["test/AP"] == pytest.approx(once["test/AP"], abs=1e-6)
    frcnn("validate", *command[1:], cwd=tmp_path)
    assert metrics_of(run_folder)["test_count"] == 3  # a validation is no test


def test_devkit_files_have_the_numbers_of_the_test(frcnn, run_folder, metrics_of, mini_voc, tmp_path) -> None:
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    options = ("--data.test_splits", "[odd]", "--save_devkit_results", "devkit")
    result = frcnn("test", "--ckpt_path", checkpoint, *options, cwd=tmp_path)
    assert result.code == 0, result.err
    assert len(list((tmp_path / "devkit").glob("comp4_det_test_*.txt"))) == 6
    result = frcnn(
        *("evaluate", "devkit", "--data.root", mini_voc, "--data.val_splits", "[odd]", "--format", "json"), cwd=tmp_path
    )
    assert result.code == 0, result.err
    metrics, document = metrics_of(run_folder), json.loads(result.out)
    for name in ("AP50_voc07", "AP50_voc", "AP", "AP50"):
        assert document[name] == pytest.approx(metrics[f"test/{name}"], abs=1e-4)
    assert document["AP50_voc"] > 0


def test_devkit_folder_that_is_a_file(frcnn, run_folder, tmp_path) -> None:
    (tmp_path / "taken").write_text("")
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    result = frcnn("test", "--ckpt_path", checkpoint, "--save_devkit_results", "taken", cwd=tmp_path)
    assert result.code == 2
    assert "--save_devkit_results taken" in result.err
    assert frcnn("validate", "--ckpt_path", checkpoint, "--save_devkit_results", "x", cwd=tmp_path).code == 2


def test_overlapping_parts_stop_a_training(frcnn, tiny_config, tmp_path) -> None:
    result = frcnn("fit", "--config", tiny_config, "--data.allow_overlap", "false", cwd=tmp_path)
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if line.startswith("frcnn: ")]
    assert len(lines) == 1
    assert "--data.train_splits and --data.val_splits share 7 images" in lines[0]
