"""`frcnn predict` takes files of many kinds, saves in the formats of others, and goes on after a kill."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import detector
from datamodules.image_files import find_images
from datamodules.voc.format import read_annotation

SHIPPED = Path(detector.__file__).parents[1] / "experiments" / "weights" / "mini_voc.ckpt"


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "predictions.json").read_text())
    return found


@pytest.fixture
def folder(mini_voc, tmp_path) -> Path:
    """Three images, one of them in a subfolder."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    names = sorted((mini_voc / "JPEGImages").iterdir())
    for source, name in zip(names, ("a.jpg", "b.jpg", "more/c.jpg"), strict=False):
        shutil.copy(source, tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def shipped(frcnn, tmp_path):
    def call(images: object, *options: object) -> Any:
        command = ("predict", "--ckpt_path", SHIPPED, "--images", images, "--output", "out", "--accelerator", "cpu")
        return frcnn(*command, *options, cwd=tmp_path)

    return call


# ---- what is looked at ----


def test_patterns_and_lists(folder, tmp_path):
    assert find_images(folder / "*.jpg").names == ["a.jpg", "b.jpg"]
    assert find_images(folder / "**" / "*.jpg").names == ["a.jpg", "b.jpg", "more/c.jpg"]
    found = find_images(folder / "**" / "c.*")
    assert (found.folder, found.names) == (folder / "more", ["c.jpg"])
    (tmp_path / "list.txt").write_text("photos/more/c.jpg\n\nphotos/a.jpg\nphotos/a.jpg\n")
    listed = find_images(tmp_path / "list.txt")
    assert (listed.folder, listed.names) == (folder, ["more/c.jpg", "a.jpg"])
    for nothing in (folder / "*.bmp", tmp_path / "list"):
        with pytest.raises(ValueError, match="no such image file or folder"):
            find_images(nothing)


def test_a_video_is_its_frames(shipped, folder, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (120, 80))
    for level in (0, 120, 240):
        frame = np.zeros((80, 120, 3), np.uint8)
        frame[:, :, 2] = level  # red, in OpenCV's order
        writer.write(frame)
    writer.release()
    found = find_images(tmp_path / "clip.avi")
    assert found.names == ["clip/000001.jpg", "clip/000002.jpg", "clip/000003.jpg"]
    frames = list(found.from_number(1))
    assert [round(int(np.asarray(frame)[:, :, 0].mean()), -1) for frame in frames] == [120, 240]
    assert np.asarray(frames[1])[:, :, 2].mean() < 20
    result = shipped("clip.avi")
    assert result.code == 0 and "3 images" in result.out
    assert sorted(path.name for path in (tmp_path / "out" / "clip").iterdir()) == [f"00000{n}.jpg" for n in (1, 2, 3)]
    (tmp_path / "bad.mp4").write_text("no video")
    assert "bad.mp4: is no video" in shipped("bad.mp4").err


def test_a_camera_gives_as_many_frames_as_are_asked_for(shipped, tmp_path, monkeypatch):
    missing = shipped("camera:87")
    assert missing.code == 2 and "camera:87: there is no such camera" in missing.err

    class Camera:
        def __init__(self, source: object) -> None:
            assert source == 0
            self.taken = 0

        def isOpened(self) -> bool:
            return True

        def grab(self) -> bool:
            self.taken += 1
            return True

        def retrieve(self) -> tuple[bool, Any]:
            return True, np.full((60, 80, 3), (0, 0, 40 * self.taken), np.uint8)

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    found = find_images("camera:0", most=3)
    assert [np.asarray(frame)[0, 0].tolist() for frame in found.from_number(1)] == [[80, 0, 0], [120, 0, 0]]
    assert len(find_images("camera:0").names) == 1000
    result = shipped("camera:0", "--max_images", 4)
    assert result.code == 0 and "4 images" in result.out
    (pictures,) = (tmp_path / "out").glob("camera-*")
    assert sorted(path.name for path in pictures.iterdir()) == [f"00000{number}.jpg" for number in (1, 2, 3, 4)]


def test_the_first_images_alone(shipped, folder):
    result = shipped("photos", "--max_images", 2)
    assert result.code == 0 and [entry["file_name"] for entry in entries(folder.parent / "out")][-1] <= "b.jpg"
    assert "--max_images 0: must be at least 1" in shipped("photos", "--max_images", 0).err


# ---- what is saved ----


def test_all_formats_hold_the_same(shipped, folder, tmp_path):
    result = shipped(folder, "--save", "images,json,voc,csv,devkit,yolo", "--batch_size", 2)
    assert result.code == 0, result.err
    out = tmp_path / "out"
    rows = entries(out)
    with (out / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["file_name"], row["class"], float(row["score"])) for row in table] == [
        (row["file_name"], row["category_name"], row["score"]) for row in rows
    ]
    assert float(table[0]["x2"]) == pytest.approx(rows[0]["bbox"][0] + rows[0]["bbox"][2], abs=2e-3)
    classes = (out / "classes.txt").read_text().split()
    assert len(classes) == 6
    devkit = {name: (out / f"comp4_det_test_{name}.txt").read_text().splitlines() for name in classes}
    assert {name: len(lines) for name, lines in devkit.items()} == {
        name: sum(row["category_name"] == name for row in rows) for name in classes
    }
    for name in ("a", "b", "more/c"):
        good = [row for row in rows if row["file_name"] == f"{name}.jpg" and row["score"] >= 0.5]
        assert good
        annotation = read_annotation(out / "Annotations" / f"{name}.xml")
        assert [one.name for one in annotation.objects] == [row["category_name"] for row in good]
        assert annotation.file_name == f"{Path(name).name}.jpg"
        with Image.open(folder / f"{name}.jpg") as image:
            assert (annotation.width, annotation.height) == image.size
            lines = [line.split() for line in (out / "labels" / f"{name}.txt").read_text().splitlines()]
            for row, one, line in zip(good, annotation.objects, lines, strict=True):
                x, y, width, height = row["bbox"]
                assert one.box == pytest.approx((x, y, x + width, y + height), abs=0.51)
                assert classes[int(line[0])] == row["category_name"]
                assert float(line[1]) * image.width == pytest.approx(x + width / 2, abs=0.01)
    again = shipped(folder, "--save", "voc")
    assert again.code == 2 and "Annotations is there already" in again.err


def test_chosen_formats_and_classes_alone(shipped, folder, tmp_path):
    result = shipped(folder, "--save", "json", "--classes", "[star, ring]")
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert {row["category_name"] for row in entries(tmp_path / "out")} == {"star", "ring"}
    assert "cow is no class" in shipped(folder, "--classes", "cow").err
    assert "--save" in shipped(folder, "--save", "png").err
    assert "tile_overlap" in shipped(folder, "--tile", 64, "--tile_overlap", 1).err
    tiled = shipped(folder, "--tile", 64, "--tile_overlap", 0.5)
    assert tiled.code == 0, tiled.err


# ---- going on ----


def start(folder: Path, *options: object) -> "subprocess.Popen[str]":
    command = ("predict", "--ckpt_path", SHIPPED, "--images", folder, "--output", folder.parent / "out")
    arguments = [str(one) for one in (*command, "--accelerator", "cpu", *options)]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_prediction_goes_on(folder, tmp_path, wait_for):
    shutil.rmtree(folder / "more")
    whole = (folder / "a.jpg").read_bytes()
    names = [f"{number:03d}.jpg" for number in range(60)]
    for name in names:
        (folder / name).write_bytes(whole)
    broken = {"000.jpg", "031.jpg", "059.jpg"}
    for name in broken:
        (folder / name).write_bytes(whole[:-500])
    journal, out = tmp_path / "out" / "predictions.partial.jsonl", tmp_path / "out"
    first = start(folder, "--batch_size", 2)
    wait_for(lambda: journal.is_file() and journal.read_bytes().count(b"\n") > 10, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / "predictions.json").exists()
    with journal.open("ab") as file:
        file.write(b'{"number": 7, "ro')  # what a kill leaves of a line
    kept = journal.read_bytes().count(b"\n") - 1
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jpg")}
    result = start(folder, "--batch_size", 2).communicate()
    assert f"going on after {kept} of 62 images" in result[1]
    assert {Path(line.split(": ")[1]).name for line in result[1].splitlines() if line.startswith("left")} == broken
    assert "59 images, " in result[0] and "3 left out" in result[0]
    numbers = [row["image_id"] for row in entries(out)]
    per_image = [row["file_name"] for row in entries(out)]
    assert numbers == sorted(numbers) and set(per_image) == {*names, "a.jpg", "b.jpg"} - broken
    assert len({per_image.count(name) for name in names if name not in broken}) == 1
    assert sum(path.stat().st_mtime_ns == before.get(path.name) for path in out.glob("*.jpg")) >= len(before) - 2
    assert not journal.exists()


def test_other_options_begin_anew(shipped, folder, tmp_path, monkeypatch):
    original = detector.TrainedDetector.detect
    left = iter([None, None, KeyboardInterrupt()])

    def detect(self, pixels):
        if (error := next(left, None)) is not None:
            raise error
        return original(self, pixels)

    monkeypatch.setattr(detector.TrainedDetector, "detect", detect)
    assert shipped(folder).code == 128 + signal.SIGINT
    assert {row["file_name"] for row in entries(tmp_path / "out")} == {"a.jpg", "b.jpg"}
    result = shipped(folder, "--score_threshold", 0.4)
    assert result.code == 0 and "beginning anew" in result.err
    assert len({row["file_name"] for row in entries(tmp_path / "out")}) == 3
    (tmp_path / "out" / "predictions.partial.jsonl").write_text("mine\n")
    assert "predictions.partial.jsonl is there already" in shipped(folder).err
    assert (tmp_path / "out" / "predictions.partial.jsonl").read_text() == "mine\n"
    assert os.listdir(tmp_path / "out" / "more") == ["c.jpg"]
