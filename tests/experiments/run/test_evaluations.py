"""Where an evaluation of a run is written: a run's own numbers are those of its own options."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may add to."""
    others = shutil.ignore_patterns("evaluations")  # of other tests
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0", ignore=others))


def test_other_options_have_a_folder_of_their_own(frcnn, run, metrics_of, tmp_path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = ("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--data.num_workers", "0")
    given = ("--model.roi.detections_per_image", "1", "--model.roi.nms_iou", "0.9")
    result = frcnn(*options, *given, cwd=tmp_path)
    assert result.code == 0
    assert {path: path.read_bytes() for path in before} == before
    folder = run / "evaluations" / "roi.detections_per_image=1,roi.nms_iou=0.9"
    assert f"{folder.relative_to(tmp_path)}/metrics.json" in result.out.replace("\n", "")
    images = [one["image_id"] for one in json.loads((folder / "predictions.json").read_text())]
    assert len(images) == len(set(images)) > 0
    assert metrics_of(folder)["val/AR@100"] == metrics_of(folder)["val/AR@1"]

    assert frcnn(*options, *given[:2], "--classes", "[star]", cwd=tmp_path).code == 0
    assert {path: path.read_bytes() for path in before} == before
    alone = run / "evaluations" / "roi.detections_per_image=1" / "classes" / "star"
    assert metrics_of(alone)["classes"] == ["star"]


def test_the_same_options_and_those_of_speed_are_the_runs_own(frcnn, run, metrics_of, tmp_path) -> None:
    (run / "metrics.json").write_text("{}")
    given = ("--model.roi.nms_iou", "0.3", "--data.eval_batch_size", "3", "--data.num_workers", "0")
    assert frcnn("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", *given, cwd=tmp_path).code == 0
    assert metrics_of(run)["val/AP50"] > 0
    assert not (run / "evaluations").exists()


def test_long_names_are_cut_and_stay_different(frcnn, run, tmp_path) -> None:
    for side in (60, 61):
        sides = [*range(32, 56), side]
        options = ("--ckpt_path", run / "checkpoints" / "last.ckpt", "--model.image.shortest_side", sides)
        assert frcnn("validate", *options, "--model.image.longest_side", "100", cwd=tmp_path).code == 0
    names = [path.name for path in (run / "evaluations").iterdir()]
    assert len(names) == 2
    assert max(len(name) for name in names) < 100


def test_a_refused_one_leaves_nothing(frcnn, run, tmp_path) -> None:
    options = ("--ckpt_path", run / "checkpoints" / "last.ckpt", "--data.num_workers", "0")
    files = {*run.iterdir()}
    for command in ("validate", "test"):  # of a test with other options the run's own folder is the place
        assert frcnn(command, *options, "--model.anchors.scales", "[1, 2, 4]", cwd=tmp_path).code == 2
        assert {*run.iterdir()} == files
    assert frcnn("validate", *options, "--model.roi.nms_iou", "0.9", cwd=tmp_path).code == 0
    assert frcnn("validate", *options, "--model.anchors.scales", "[1, 2, 4]", cwd=tmp_path).code == 2
    assert [path.name for path in (run / "evaluations").iterdir()] == ["roi.nms_iou=0.9"]
    (tmp_path / "mine").mkdir()
    where = ("--results_dir", "mine/new/one")
    assert frcnn(*options, "--model.anchors.scales", "[1, 2, 4]", *where, cwd=tmp_path).code == 2
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("option", ["--run_name", "--runs_dir", "--experiment"])
def test_names_of_a_new_run_are_refused(frcnn, trained, tmp_path, option) -> None:
    result = frcnn("validate", "--ckpt_path", trained / "checkpoints" / "last.ckpt", option, "x", cwd=tmp_path)
    assert result.code == 2
    assert f"{option}: an evaluation goes into its run's folder" in result.err
    assert "--results_dir" in result.err
    options = (option, "x", "--results_dir", "results")
    result = frcnn("validate", "--ckpt_path", trained / "checkpoints" / "last.ckpt", *options, cwd=tmp_path)
    assert result.code == 2
    assert not (tmp_path / "results").exists()
