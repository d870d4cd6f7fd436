"""`--classes`: the numbers of some classes alone, from `evaluate`, `validate` and `test`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules.ground_truth import read_ground_truth
from datamodules.voc.reader import VOCFormat

PAIR = ("rectangle", "triangle")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may add to."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))


def test_validation_of_some_classes_is_the_mean_of_their_own(frcnn, run, mini_voc, metrics_of, tmp_path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = ("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    for names in ("[triangle, rectangle]", *PAIR):
        assert frcnn(*options, "--classes", names, cwd=tmp_path).code == 0
    assert {path: path.read_bytes() for path in before} == before  # the numbers of all classes, and the curves
    whole, pair = metrics_of(run), metrics_of(run / "classes" / "triangle-rectangle")
    each = [metrics_of(run / "classes" / name) for name in PAIR]

    per_class = [whole[f"val/AP50_voc_class/{name}"] for name in PAIR]
    assert sum(per_class) > 0.01
    assert pair["val/AP50_voc"] == pytest.approx(np.mean(per_class))
    assert pair["val/AP50_voc"] != pytest.approx(whole["val/AP50_voc"])
    for name in ("val/AP", "val/AP50", "val/AP75", "val/AP50_voc07", "val/AR@100"):
        assert pair[name] == pytest.approx(np.mean([one[name] for one in each]))
    assert [name for name in pair if "class/" in name] == [f"val/AP50_voc_class/{name}" for name in PAIR]
    assert pair["classes"] == list(PAIR)
    assert "classes" not in whole

    # One recall from the others: of all objects that are not difficult, weighted by how many there are.
    objects = read_ground_truth(VOCFormat(mini_voc), ["odd"]).objects
    count = np.bincount(objects.label[~objects.difficult], minlength=7)[[3, 6]]
    recalls = [one["val/proposal_recall@30"] for one in each]
    assert pair["val/proposal_recall@30"] == pytest.approx(np.average(recalls, weights=count))

    document = frcnn(
        *("evaluate", run / "classes" / "triangle-rectangle" / "predictions.json", "--data.root", mini_voc),
        *("--data.val_splits", "odd", "--classes", "[triangle, rectangle]", "--format", "json"),
        cwd=tmp_path,
    ).out
    evaluated = json.loads(document)
    assert evaluated["classes"] == list(PAIR)
    assert evaluated["objects"] == count.sum()
    for name in ("AP", "AP50_voc07", "AP50_voc"):  # predictions.json has rounded scores and boxes
        assert evaluated[name] == pytest.approx(pair[f"val/{name}"], abs=1e-3)


def test_a_test_of_one_class_and_a_folder_that_is_used_twice(frcnn, run, metrics_of, tmp_path) -> None:
    options = ("test", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--results_dir", tmp_path / "results")
    assert frcnn(*options, cwd=tmp_path).code == 0
    whole = metrics_of(tmp_path / "results")
    assert frcnn(*options, "--classes", "[star]", cwd=tmp_path).code == 0
    star = metrics_of(tmp_path / "results")
    assert star["test/AP50_voc"] == pytest.approx(whole["test/AP50_voc_class/star"])
    assert "test/AP50_voc_class/ring" not in star  # of another evaluation
    assert star["test_count"] == 2
    assert star["test_history"][0]["test/AP50_voc_class/ring"] == whole["test/AP50_voc_class/ring"]
    assert frcnn(*options, cwd=tmp_path).code == 0
    assert "classes" not in metrics_of(tmp_path / "results")


@pytest.mark.parametrize(
    ("classes", "words"), [("[star, zebra]", "zebra is no class"), ("[]", "no class"), ("Star", "Star is no class")]
)
@pytest.mark.parametrize("command", ["validate", "evaluate"])
def test_unknown_classes_are_refused_and_the_known_ones_named(
    command, classes, words, frcnn, trained, mini_voc, tmp_path
) -> None:
    options = {
        "validate": ("--ckpt_path", trained / "checkpoints" / "last.ckpt"),
        "evaluate": (trained / "predictions.json", "--data.root", mini_voc, "--data.val_splits", "[odd]"),
    }
    result = frcnn(command, *options[command], "--classes", classes, cwd=tmp_path)
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert line.startswith("frcnn: ")
    assert "classes" in line
    if classes != "[]":
        assert words in line
        assert line.endswith("there are cross, ellipse, rectangle, ring, star, triangle")
    assert not (trained / "classes").exists()
