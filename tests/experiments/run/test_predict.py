"""`frcnn predict`: any image files in, pictures and predictions.json out, from the checkpoint alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ["cross", "ellipse", "rectangle", "ring", "star", "triangle"]


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy of the checkpoint outside any run folder: what a user was sent."""
    return Path(shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "sent.ckpt"))


@pytest.fixture
def images(mini_voc, tmp_path) -> Path:
    """Three images: a JPEG, one in a subfolder, and a PNG with transparency; and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    names = sorted((mini_voc / "JPEGImages").iterdir())
    shutil.copy(names[0], folder / "a.jpg")
    shutil.copy(names[1], folder / "more" / "b.JPG")
    Image.open(names[2]).convert("RGBA").save(folder / "c.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def check_entries(entries: list[dict[str, Any]], folder: Path, names: list[str]) -> None:
    assert {entry["file_name"] for entry in entries} == set(names)
    for entry in entries:
        width, height = Image.open(folder / entry["file_name"]).size
        x, y, w, h = entry["bbox"]
        assert min(x, y) >= 0 and w > 0 and h > 0
        assert x + w <= width + 2e-3 and y + h <= height + 2e-3
        assert entry["category_name"] == CLASSES[entry["category_id"] - 1]
        assert names[entry["image_id"]] == entry["file_name"]
        assert 0 < entry["score"] <= 1


def test_folder(frcnn, checkpoint, images, tmp_path):
    result = frcnn(
        *("predict", "--ckpt_path", checkpoint, "--images", images, "--output", "out"),
        *("--accelerator", "cpu", "--batch_size", 2),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    out = tmp_path / "out"
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["a.jpg", "c.jpg", "more/b.jpg", "predictions.json"]
    check_entries(json.loads((out / "predictions.json").read_text()), images, ["a.jpg", "c.png", "more/b.JPG"])
    for name, source in (("a.jpg", "a.jpg"), ("c.jpg", "c.png"), ("more/b.jpg", "more/b.JPG")):
        width, height = Image.open(images / source).size
        drawn = Image.open(out / name)
        assert min(drawn.size) >= min(400, width, height)
        assert drawn.width / width == drawn.height / height


def test_single_file(frcnn, checkpoint, images, tmp_path):
    result = frcnn(
        *("predict", "--ckpt_path", checkpoint, "--images", images / "more" / "b.JPG", "--output", "out"),
        *("--accelerator", "cpu"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.jpg", "predictions.json"]
    check_entries(json.loads((tmp_path / "out" / "predictions.json").read_text()), images / "more", ["b.JPG"])


def test_score_threshold_decides_what_is_drawn_and_not_what_is_written(frcnn, checkpoint, images, tmp_path):
    written, pictures, said = [], [], []
    for threshold in (0, 1):
        out = tmp_path / f"out{threshold}"
        result = frcnn(
            *("predict", "--ckpt_path", checkpoint, "--images", images / "a.jpg", "--output", out),
            *("--score_threshold", threshold, "--accelerator", "cpu"),
            cwd=tmp_path,
        )
        assert result.code == 0, result.err
        written.append(json.loads((out / "predictions.json").read_text()))
        pictures.append(np.asarray(Image.open(out / "a.jpg"), dtype=int))
        said.append(re.search(r"the highest score is ([\d.]+): --score_threshold ([\d.e-]+) draws", result.out))
    assert said[0] is None and float(said[1][2]) < float(said[1][1]) < 1
    assert float(said[1][1]) == pytest.approx(max(one["score"] for one in written[1]), rel=0.01)
    assert written[0] == written[1] != []
    assert np.abs(pictures[0] - pictures[1]).max() > 100
    plain = Image.open(images / "a.jpg").resize(pictures[1].shape[1::-1], Image.Resampling.BICUBIC)
    assert np.abs(pictures[1] - np.asarray(plain, dtype=int)).mean() < 3


def test_same_detections_as_the_validation(frcnn, checkpoint, trained, mini_voc, tmp_path):
    """Images come without annotations, but are resized and normalised as in the validation."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (mini_voc / "ImageSets" / "Main" / "odd.txt").read_text().split():
        shutil.copy(mini_voc / "JPEGImages" / f"{name}.jpg", folder)
    result = frcnn(
        *("predict", "--ckpt_path", checkpoint, "--images", folder, "--output", "out"),
        *("--accelerator", "cpu", "--batch_size", 2),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err

    def by_image(path: Path) -> list[tuple[Any, ...]]:
        rows = json.loads(path.read_text())
        return sorted((row["file_name"], row["category_name"], row["score"], tuple(row["bbox"])) for row in rows)

    predicted, validated = by_image(tmp_path / "out" / "predictions.json"), by_image(trained / "predictions.json")
    assert len(predicted) == len(validated)
    assert predicted == validated


def test_works_after_run_and_data_are_gone(frcnn, tiny_config, mini_voc, images, tmp_path):
    """Nothing but the checkpoint is read: neither the run's folder nor its config, its data or its weights file."""
    data = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    assert frcnn("fit", "--config", tiny_config, "--data.root", data, cwd=tmp_path).code == 0
    shutil.move(tmp_path / "runs" / "tiny" / "seed0" / "checkpoints" / "best.ckpt", tmp_path / "kept.ckpt")
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(data)
    result = frcnn(
        *("predict", "--ckpt_path", "kept.ckpt", "--images", images, "--output", "out", "--accelerator", "cpu"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 3
    assert "3 images" in result.out


def test_views_change_the_detections(frcnn, checkpoint, images, tmp_path):
    written = []
    for number, options in enumerate(([], ["--flip"], ["--shortest_sides", "[48, 64]"])):
        result = frcnn(
            *("predict", "--ckpt_path", checkpoint, "--images", images, "--output", f"out{number}"),
            *("--accelerator", "cpu", *options),
            cwd=tmp_path,
        )
        assert result.code == 0, result.err
        written.append(json.loads((tmp_path / f"out{number}" / "predictions.json").read_text()))
        check_entries(written[-1], images, ["a.jpg", "c.png", "more/b.JPG"])
    assert written[0] != written[1] != written[2] != written[0]


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ("[64, big]", "'[64, big]' is not a list of whole numbers"),
        ("[4]", "image.test_shortest_sides: [4] must be >= 16"),
    ],
)
def test_bad_sides(frcnn, checkpoint, images, tmp_path, sides, message):
    result = frcnn(
        *("predict", "--ckpt_path", checkpoint, "--images", images, "--output", "out", "--shortest_sides", sides),
        cwd=tmp_path,
    )
    assert result.code == 2
    assert message in result.err
