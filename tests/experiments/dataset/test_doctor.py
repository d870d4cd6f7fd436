"""frcnn doctor, and what a training does with the dataset that it complains about."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

KEYS = {"images", "objects", "difficult", "classes", "problems"}


@pytest.fixture(scope="module")
def classes(broken_dataset):
    return ("--data.class_names", f"[{', '.join(broken_dataset.class_names)}]")


def _items(problems, root):
    return {(os.path.relpath(item["file"], root), item["object"], item["kind"]) for item in problems}


def test_json_of_a_healthy_dataset(frcnn, mini_voc, tmp_path):
    result = frcnn("doctor", mini_voc, "--format", "json", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert set(document) >= KEYS
    assert document["images"] == 20 and document["problems"] == [] and document["breaks_training"] == 0
    assert sum(document["classes"].values()) == document["objects"] == sum(document["object_size"]["counts"])
    assert sum(document["aspect_ratio"]["counts"]) == document["objects"]
    assert document["object_size"]["edges"][-1] is None
    assert len(document["object_size"]["edges"]) == len(document["object_size"]["counts"]) + 1


def test_json_of_a_broken_dataset(frcnn, broken_dataset, classes, tmp_path):
    result = frcnn("doctor", broken_dataset.root, *classes, "--format", "json", cwd=tmp_path)
    assert (result.code, result.err) == (1, "")
    document = json.loads(result.out)
    assert _items(document["problems"], broken_dataset.root) - {(".", None, "class_without_objects")} == (
        broken_dataset.problems - {(".", None, "class_without_objects")}
    )
    assert all(set(problem) >= {"file", "object", "kind", "effect"} for problem in document["problems"])
    assert document["kinds"]["missing_image"] == 2
    assert document["classes"]["zebra"] == 1 and document["classes"]["hexagon"] == 0


def test_table(frcnn, broken_dataset, classes, tmp_path):
    result = frcnn("doctor", broken_dataset.root, *classes, cwd=tmp_path)
    assert result.code == 1
    for kind in {kind for _, _, kind in broken_dataset.problems}:
        assert f"\n{kind}: " in result.out
    assert f"of {len(broken_dataset.problems)} problems would stop a training" in result.out
    assert "mini_0000" in result.out and "clipped to the image" in result.out


def test_plot(frcnn, mini_voc, tmp_path):
    assert frcnn("doctor", mini_voc, "--plot", "new/plot.png", cwd=tmp_path).code == 0
    with Image.open(tmp_path / "new" / "plot.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        ([], "DATASET_DIR"),
        (["{}", "--format", "xml"], "--format"),
        (["{}", "--plot", "plot.doc"], "plot.doc"),
        (["{}", "--data.train_splits", "[trian]"], "trian.txt"),
        (["{}", "--data.class_names", "[ring, ring]"], "twice"),
    ],
)
def test_bad_usage(frcnn, mini_voc, tmp_path, arguments, named):
    result = frcnn("doctor", *(argument.format(mini_voc) for argument in arguments), cwd=tmp_path)
    assert result.code == 2 and result.out == ""
    assert named in result.err and len(result.err.splitlines()) == 1


def test_annotations_alone_do_without_torch():
    """Importing it takes longer than reading thousands of annotations."""
    code = "import sys, experiments.dataset.doctor; print({'torch', 'pytorch_lightning'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# ---- training ----


def _fit(frcnn, tiny_config, broken_dataset, classes, cwd, *more):
    arguments = ("--data.root", broken_dataset.root, "--data.val_splits", "[val]", "--data.allow_overlap", "false")
    return frcnn("fit", "--config", tiny_config, *arguments, *classes, *more, cwd=cwd)


def test_training_stops_with_the_whole_list(frcnn, tiny_config, broken_dataset, classes, tmp_path):
    result = _fit(frcnn, tiny_config, broken_dataset, classes, tmp_path)
    assert result.code == 2
    first, *rest = result.err.splitlines()
    assert first.startswith("frcnn: ") and first.endswith("more files with problems)")
    assert all(line.startswith("  ") for line in rest)
    listed = [line for line in rest if line.split(":")[0].strip() in {kind for _, _, kind in broken_dataset.stops}]
    assert len(listed) == len(broken_dataset.stops)
    for file, index, kind in broken_dataset.stops:
        lines = [line for line in listed if line.startswith(f"  {kind}: ")]
        name = Path(file).stem
        assert any(name in line and (index is None or f"object {index}" in line) for line in lines), (file, kind)
    assert "--data.on_error skip" in rest[-1]
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "runs").exists()


def test_training_without_what_is_broken(frcnn, tiny_config, broken_dataset, classes, tmp_path):
    result = _fit(frcnn, tiny_config, broken_dataset, classes, tmp_path, "--data.on_error", "skip")
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "tiny" / "seed0"
    (line,) = [line for line in result.err.splitlines() if line.startswith("--data.on_error skip")]
    assert "leaves out 7 images and 5 objects" in line and line.endswith("runs/tiny/seed0/data_problems.json")
    problems = json.loads((run / "data_problems.json").read_text())
    assert _items(problems, broken_dataset.root) == broken_dataset.stops
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step"] == len(broken_dataset.usable) // 2
    assert math.isfinite(metrics["train/loss"])
