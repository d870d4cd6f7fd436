"""`frcnn predict` meets what folders of images really hold, and neither loses its work nor a file of the user's."""

import json
import os
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detector import TrainedDetector
from detector.training.callbacks.detection_images import DetectionImages
from detector.use import drawing
from detector.use.drawing import draw_boxes
from experiments.run import predict as predict_module


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "predictions.json").read_text())
    return found


# ---- shapes ----


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((3, 900), (27, 8100)),  # nine times, and not 134
        ((10_000, 1), (10_000, 1)),
        ((1, 1), (400, 400)),
        ((70_000, 2), (65_500, 2)),  # more than a JPEG can be long
    ],
)
def test_pictures_of_extreme_shapes(run, tmp_path, size, drawn):
    Image.new("RGB", size, (200, 30, 60)).save(tmp_path / "strip.png")
    result = run("strip.png", "--score_threshold", 0)
    assert result.code == 0, result.err
    with Image.open(tmp_path / "out" / "strip.jpg") as picture:
        assert picture.size == drawn
    for entry in entries(tmp_path / "out"):
        x, y, width, height = entry["bbox"]
        assert x >= 0 and y >= 0 and x + width <= size[0] + 0.01 and y + height <= size[1] + 0.01


def test_boxes_follow_a_picture_that_is_made_smaller():
    image = torch.zeros(3, 30, 120, dtype=torch.uint8)
    picture = draw_boxes(image, torch.tensor([[60.0, 10.0, 90.0, 20.0]]), [""], [(255, 0, 0)], max_side=60)
    assert picture.shape == (3, 15, 60)
    rows, columns = picture.sum(0).nonzero().unbind(1)
    assert [int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)] == [30, 5, 45, 10]


# ---- what cannot be read ----


def test_images_that_cannot_be_read_are_named_and_the_rest_is_kept(run, photo, tmp_path):
    folder = tmp_path / "photos"
    (folder / "folder.jpg").mkdir(parents=True)
    shutil.copy(photo, folder / "good.jpg")
    shutil.copy(photo, folder / "folder.jpg" / "inside.jpg")
    (folder / "cut.jpg").write_bytes(photo.read_bytes()[:-700])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.webp").write_text("no image")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "._good.jpg").write_bytes(b"\0\5\x16\7")  # what macOS leaves behind
    os.mkfifo(folder / "pipe.png")
    result = run(folder, "--batch_size", 2)
    assert result.code == 1
    assert written(tmp_path / "out") == ["folder.jpg/inside.jpg", "good.jpg", "predictions.json"]
    assert {entry["file_name"] for entry in entries(tmp_path / "out")} == {"good.jpg", "folder.jpg/inside.jpg"}
    lines = [line for line in result.err.splitlines() if line.startswith("left out: ")]
    named = {Path(line.removeprefix("left out: ").split(": ")[0]).name for line in lines}
    assert named == {"cut.jpg", "empty.png", "text.webp", "gone.jpg", "pipe.png"}
    assert "2 images, " in result.out and "5 left out" in result.out


def test_when_no_image_can_be_read(run, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    result = run("bad.png")
    assert result.code == 1
    assert result.err.count("bad.png") == 1 and "Traceback" not in result.err
    assert entries(tmp_path / "out") == []


def test_a_crash_and_ctrl_c_leave_what_is_done(run, photo, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        shutil.copy(photo, folder / f"{number}.jpg")
    original = TrainedDetector.detect

    def stops(error: BaseException) -> None:
        left = iter([None, None, error])

        def detect(self, pixels):
            if (raised := next(left)) is not None:
                raise raised
            return original(self, pixels)

        monkeypatch.setattr(TrainedDetector, "detect", detect)

    stops(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(folder, output="crashed")
    stops(KeyboardInterrupt())
    result = run(folder, output="interrupted")
    assert result.code == 128 + signal.SIGINT
    assert "stopped after 2 of 3 images; predictions.json holds these" in result.err
    for output in ("crashed", "interrupted"):
        assert {entry["file_name"] for entry in entries(tmp_path / output)} == {"0.jpg", "1.jpg"}


def test_sigterm_leaves_what_is_done(run, photo, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        shutil.copy(photo, folder / f"{number}.jpg")
    original = predict_module.save_picture

    def save(picture, path):
        original(picture, path)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(predict_module, "save_picture", save)
    result = run(folder)
    assert result.code == 128 + signal.SIGTERM
    assert {entry["file_name"] for entry in entries(tmp_path / "out")} == {"0.jpg"}


def test_a_picture_that_cannot_be_written_is_named(run, photo, tmp_path):
    long = "x" * 251
    shutil.copy(photo, tmp_path / f"{long}.jpg")
    shutil.copy(photo, tmp_path / f"{long}.png")  # so that both need a longer name than a file can have
    (tmp_path / "photos").mkdir()
    for suffix in ("jpg", "png"):
        (tmp_path / f"{long}.{suffix}").rename(tmp_path / "photos" / f"{long}.{suffix}")
    result = run("photos")
    assert result.code == 1
    assert result.err.count("its picture cannot be written") == 2
    assert len({entry["file_name"] for entry in entries(tmp_path / "out")}) == 2


# ---- the same reader as in training ----


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_turned_photographs_are_seen_upright(run, photo, tmp_path, orientation):
    """Stored turned with a tag that turns it back: the detections are those of the upright image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(photo) as image:
        upright = image.convert("RGB")
    upright.save(folder / "upright.png")
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    stored = upright.transpose(back)
    stored.save(folder / "turned.png", exif=exif)
    assert np.array_equal(ImageOps.exif_transpose(Image.open(folder / "turned.png")), upright)
    assert run(folder).code == 0

    def of(name: str) -> list[tuple[Any, ...]]:
        return [(e["score"], e["category_id"], *e["bbox"]) for e in entries(tmp_path / "out") if e["file_name"] == name]

    assert of("turned.png") == of("upright.png") != []
    sizes = [Image.open(tmp_path / "out" / f"{name}.jpg").size for name in ("turned", "upright")]
    assert sizes[0] == sizes[1]


def test_a_limit_on_pixels_that_can_be_raised(run, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(photo) as image:
        size = image.size
        image.save(folder / "a.png")
        image.save(folder / "a.gif")
    data = bytearray(photo.read_bytes())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65_500, 65_500)
    (folder / "bomb.jpg").write_bytes(data)
    result = run(folder)
    assert result.code == 1
    assert "bomb.jpg: has 65500 x 65500 pixels" in result.err and "data.max_pixels" in result.err
    assert {entry["file_name"] for entry in entries(tmp_path / "out")} == {"a.gif", "a.png"}
    pixels = size[0] * size[1]
    assert run(folder / "a.png", "--max_pixels", pixels - 1, output="small").code == 1
    assert run(folder / "a.png", "--data.max_pixels", pixels, output="enough").code == 0
    assert run(folder / "a.png", "--max_pixels", 0, output="none").code == 2


def test_all_formats_are_found_and_the_others_named(run, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    formats = {"gif": "GIF", "jfif": "JPEG", "webp": "WEBP", "JPE": "JPEG", "tga": "TGA", "bare": "PNG"}
    with Image.open(photo) as image:
        for suffix, kind in formats.items():
            image.save(folder / (f"{suffix}.{suffix}" if suffix != "bare" else "bare"), kind)
        frames = [image.convert("P"), ImageOps.invert(image.convert("RGB")).convert("P")]
        frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
        clear = image.convert("RGB").quantize(32)
        clear.save(folder / "clear.png", transparency=bytes([0] * 16 + [255] * 16))
        image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((40, 50), 30_000, np.uint16)).save(folder / "deep.png")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "notes.txt").write_text("no image")
    (folder / "LICENSE").write_text("no image")
    result = run(folder, "--score_threshold", 0)
    assert result.code == 1
    assert result.err.count("left out:") == 1 and "phone.HEIC: images of the format heic are not read" in result.err
    assert "10 images" in result.out and "1 left out" in result.out
    assert "Palette images" not in result.err
    first = np.asarray(Image.open(tmp_path / "out" / "moving.jpg"), dtype=int)
    with Image.open(photo) as image:
        plain = np.asarray(image.convert("RGB").resize(first.shape[1::-1]), dtype=int)
    assert np.abs(first - plain).mean() < np.abs(first - (255 - plain)).mean()


def test_images_in_linked_folders_are_found_once(run, photo, tmp_path):
    folder, other = tmp_path / "photos", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    shutil.copy(photo, other / "a.jpg")
    (folder / "linked").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    result = run(folder)
    assert result.code == 0, result.err
    assert written(tmp_path / "out") == ["linked/a.jpg", "predictions.json"]


# ---- names ----


def test_file_names_that_are_no_utf_8_or_have_line_breaks(run, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [os.fsdecode(b"caf\xe9.jpg"), "two\nlines.jpg"]
    for name in names:
        shutil.copy(photo, folder / name)
    (folder / os.fsdecode(b"bad\xff\n.png")).write_text("no image")
    result = run(folder, output=os.fsdecode(b"out\xe9"))
    assert result.code == 1
    result.out.encode()  # prints on any terminal
    lines = [line for line in result.err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 1 and r"bad\xff\n.png" in lines[0]
    out = tmp_path / os.fsdecode(b"out\xe9")
    assert written(out) == sorted([*names, "predictions.json"])
    text = (out / "predictions.json").read_bytes()
    text.decode("ascii")
    assert {entry["file_name"] for entry in json.loads(text)} == set(names)


# ---- 12 bits ----


def test_a_checkpoint_knows_the_bit_depth_of_its_training(frcnn, tiny_config, mini_voc, tmp_path):
    """Trained, validated and predicted on greyscale images whose 12 bits are an 8-bit image's times 16."""
    root = Path(shutil.copytree(mini_voc, tmp_path / "data", ignore=shutil.ignore_patterns("*.jpg")))
    (root / "JPEGImages").mkdir(exist_ok=True)
    (tmp_path / "eight").mkdir()
    for path in sorted((mini_voc / "JPEGImages").iterdir()):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 16).save(root / "JPEGImages" / f"{path.stem}.png")
        Image.fromarray(grey).save(tmp_path / "eight" / f"{path.stem}.png")
    options = ("--config", tiny_config, "--data.root", root)
    assert frcnn("fit", *options, "--data.bit_depth", 12, cwd=tmp_path).code == 0
    checkpoint = tmp_path / "runs" / "tiny" / "seed0" / "checkpoints" / "last.ckpt"
    refused = frcnn("validate", *options, "--ckpt_path", checkpoint, "--results_dir", "r", cwd=tmp_path)
    assert refused.code == 2
    assert "trained with bit_depth 12, but now it is 16" in refused.err

    def detections(images: Path, *more: object) -> list[Any]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        command = ("predict", "--ckpt_path", checkpoint, "--images", images, "--output", "out", "--accelerator", "cpu")
        assert frcnn(*command, *more, cwd=tmp_path).code == 0
        return [(e["file_name"], e["score"], e["bbox"]) for e in entries(tmp_path / "out")]

    twelve = detections(root / "JPEGImages")
    assert twelve == detections(tmp_path / "eight") != []
    assert detections(root / "JPEGImages", "--bit_depth", 16) != twelve


def test_pictures_of_a_training_are_bounded():
    """Boxes and detections are where they belong in the smaller picture."""
    image = torch.zeros(3, 1000, 4096, dtype=torch.uint8)
    box = torch.tensor([[1000.0, 400.0, 1400.0, 600.0]])
    target = {"boxes": box + 1000, "labels": torch.tensor([1]), "difficult": torch.tensor([False])}
    found = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    picture = DetectionImages().draw(image, target, found, [""])
    assert picture.shape[0] == 3 and picture.shape[2] == 2048
    assert not picture[:, 450:500].any() and picture[:, 500:].any()  # below the image is the legend
    assert picture[:, 250, 500:502].float().mean() > 50 and not picture[:, 250, 520:680].any()
    assert DetectionImages().draw(image[:, :110, :150], target, found, [""]).shape[2] == 400  # captions fit in


def test_enlarged_pictures_are_bounded():
    assert drawing.picture_size(1, 10_000, min_side=400) == (1, 10_000)
    assert drawing.picture_size(30, 40, min_side=400) == (420, 560)
    assert drawing.picture_size(100, 500, min_side=320) == (400, 2000)
    assert drawing.picture_size(2, 3000, min_side=400) == (4, 6000)
    assert drawing.picture_size(131_000, 10) == (65_500, 5)
