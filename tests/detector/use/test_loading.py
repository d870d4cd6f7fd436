"""`detector.load`: a trained detector takes images of any kind, as they are meant or not at all."""

import doctest
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import detector
from detector.errors import InputError
from detector.use import detections, loading
from detector.use.pixels import pixels_of
from detector.use.reading import USUAL, Reading, read_image

ROOT = Path(detector.__file__).parents[1]
CHECKPOINT = ROOT / "experiments" / "weights" / "mini_voc.ckpt"


@pytest.fixture(scope="module")
def shipped() -> detector.TrainedDetector:
    return detector.load(CHECKPOINT, device="cpu")


@pytest.fixture
def photo(mini_voc) -> Path:
    return sorted((mini_voc / "JPEGImages").iterdir())[0]


def rows(found: detector.Detections) -> list[Any]:
    return [tuple(one) for one in found]


# ---- what it takes ----


def test_all_kinds_of_one_image_give_the_same(shipped, photo):
    array = read_image(photo)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = rows(shipped(photo))
    assert len(wanted) > 3
    rgba = np.dstack((array, np.full(array.shape[:2], 7, np.uint8)))
    kinds: list[Any] = [
        *(
            str(photo),
            Image.open(photo),
            Image.fromarray(rgba),
            array,
            rgba,
            tensor,
            torch.from_numpy(rgba).movedim(2, 0),
        ),
        *(
            array / 255,
            array.astype(np.float32),
            (array / 255).astype(np.float16),
            tensor.double() / 255,
            tensor.float(),
        ),
        *(array.astype(np.uint16) * 257, tensor.to(torch.uint16) * 256),
    ]
    for kind in kinds:
        found = shipped(kind)
        assert isinstance(found, detector.Detections)
        assert rows(found) == wanted, type(kind)
    batches: list[Any] = [tensor[None], array[None], [photo], (tensor,), (tensor / 255)[None], np.stack((array,)) / 255]
    for batch in batches:
        found = shipped(batch)
        assert isinstance(found, list) and [rows(one) for one in found] == [wanted]


def test_grey_images_of_any_depth_are_one_image(shipped, photo):
    with Image.open(photo) as image:
        grey = np.array(image.convert("L"))
    wanted = rows(shipped(np.repeat(grey[:, :, None], 3, 2)))
    deep = grey.astype(np.uint16) << 8
    for kind in (
        grey,
        grey[:, :, None],
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
        deep,
        Image.fromarray(deep),
    ):
        assert rows(shipped(kind)) == wanted
    assert torch.equal(pixels_of(grey.astype(np.uint16) << 4, Reading(12)), pixels_of(grey, USUAL))
    assert torch.equal(pixels_of(Image.fromarray(grey.astype(np.uint16) << 4), Reading(12)), pixels_of(grey, USUAL))


def test_a_batch_of_floats_has_one_range():
    """An almost black image beside a bright one is almost black, and alone it is what its values can be alone."""
    batch = np.zeros((2, 4, 5, 3))
    batch[0], batch[1] = 1, 200
    split = loading.several(batch)
    assert split is not None
    assert [int(pixels_of(one, USUAL).max()) for one in split] == [1, 200]
    assert int(pixels_of(batch[0], USUAL).max()) == 255


def test_a_generator_streams(shipped, photo):
    taken = []

    def images() -> Any:
        for number in range(100):
            taken.append(number)
            yield photo

    stream = shipped(images(), 0.5, batch_size=2)
    assert taken == []
    first = next(stream)
    assert len(first) == len(shipped(photo).above(0.5)) and len(taken) < 10


def test_turned_photographs_are_upright(shipped, photo, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    wanted = rows(shipped(np.asarray(upright)))
    assert rows(shipped(tmp_path / "turned.png")) == rows(shipped(Image.open(tmp_path / "turned.png"))) == wanted


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 40, 50), np.uint8), r"an array of shape \(3, 40, 50\); it must be \(H, W, 3\)"),
        (torch.zeros(40, 50, 3), r"a tensor of shape \(40, 50, 3\); it must be \(3, H, W\)"),
        (torch.zeros(2, 40, 50, 3, dtype=torch.uint8), r"a tensor of shape \(40, 50, 3\)"),
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.full((4, 4, 3), -0.5), r"values from -0.5 to -0.5; floats must be in 0..1 or 0..255"),
        (np.full((4, 4, 3), 256.0), "values from 256 to 256"),
        (np.full((4, 4, 3), np.nan), "values from nan"),
        (np.zeros((4, 4, 3), np.int64), "values of type int64; give uint8"),
        (7, "give a path, an image of Pillow's"),
        ([7], "not int"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_what_has_no_clear_meaning_is_refused_in_one_line(shipped, image, message):
    with pytest.raises(InputError, match=message) as refused:
        shipped(image)
    assert "\n" not in str(refused.value)


# ---- what it gives ----


def test_the_same_numbers_as_frcnn_predict(frcnn, trained, mini_voc, tmp_path):
    command = ("predict", "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--images", mini_voc / "JPEGImages")
    assert frcnn(*command, "--output", "out", "--accelerator", "cpu", "--batch_size", 3, cwd=tmp_path).code == 0
    paths = sorted((mini_voc / "JPEGImages").iterdir())
    found = detector.load(trained, device="cpu")(paths, batch_size=3)
    mine = [row for index, one in enumerate(found) for row in one.to_coco(index)]
    assert mine == json.loads((tmp_path / "out" / "predictions.json").read_text()) != []


def some(size: tuple[int, int] = (40, 60)) -> detector.Detections:
    boxes = torch.tensor([[1.2, 2.7, 10.4, 20.2], [0.0, 0.0, 60.0, 40.0], [59.8, 39.7, 60.0, 40.0]])
    names = {1: "cat", 2: "dog"}
    return detector.Detections(
        boxes,
        torch.tensor([0.9, 0.5, 0.25]),
        torch.tensor([2, 1, 2]),
        names,
        size,
        np.zeros((*size, 3), np.uint8),
        "a.jpg",
    )


def test_names_indices_and_filters():
    found = some()
    assert (len(found), found.names) == (3, ["dog", "cat", "dog"])
    assert [one.name for one in found] == found.names and found[-1].score == 0.25
    assert found[0].label == 2 and found.class_names[2] == "dog" and 0 not in found.class_names
    assert found[0].box == pytest.approx((1.2, 2.7, 10.4, 20.2))
    assert found.above(0.5).names == ["dog", "cat"] and found[1:].names == ["cat", "dog"]
    assert found[[2]].names == found[found.scores < 0.3].names == ["dog"] and len(found[[]]) == 0
    assert found.of("cat").scores.tolist() == [0.5]
    with pytest.raises(InputError, match="cow is no class; there are cat, dog"):
        found.of("cow")
    assert repr(found) == "Detections(3: dog 0.90, cat 0.50, dog 0.25)" and repr(found[[]]) == "Detections(0)"


def test_formats_of_others(tmp_path):
    from datamodules.voc.format import read_annotation

    first = some().to_coco(7)[0]
    assert first["bbox"] == [1.2, 2.7, 9.2, 17.5] and first["score"] == 0.9
    assert (first["image_id"], first["file_name"], first["category_id"]) == (7, "a.jpg", 2)
    (tmp_path / "a.xml").write_text(some().to_voc())
    text = (tmp_path / "a.xml").read_text()
    assert "<xmin>2</xmin>" in text and "<ymin>4</ymin>" in text and "<xmax>10</xmax>" in text
    annotation = read_annotation(tmp_path / "a.xml")
    assert (annotation.file_name, annotation.width, annotation.height) == ("a.jpg", 60, 40)
    assert [one.name for one in annotation.objects] == ["dog", "cat", "dog"]
    assert [one.box for one in annotation.objects] == [(1, 3, 10, 20), (0, 0, 60, 40), (59, 39, 60, 40)]


def test_supervision(monkeypatch):
    made: dict[str, Any] = {}
    package: Any = type(sys)("supervision")
    package.Detections = made.update
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="pip install supervision"):
        some().to_supervision()
    package.Detections = lambda **columns: columns
    monkeypatch.setitem(sys.modules, "supervision", package)
    theirs = some().to_supervision()
    assert theirs["class_id"].tolist() == [1, 0, 1] and theirs["data"]["class_name"].tolist() == ["dog", "cat", "dog"]
    assert theirs["xyxy"].shape == (3, 4) and theirs["confidence"].dtype == np.float32


def test_drawing_reads_a_file_again(shipped, photo):
    found = shipped(photo)
    assert found.image == photo
    picture, plain = (np.asarray(one.draw(min_side=0)).astype(int) for one in (found.above(0.5), found.above(2)))
    assert np.array_equal(plain, read_image(photo)) and (picture != plain).any(axis=2).sum() > 100


# ---- where it comes from ----


def test_a_run_a_folder_of_runs_and_nothing(trained, tmp_path):
    assert (
        detector.load(trained).module.state_dict().keys()
        == detector.load(trained / "checkpoints").module.state_dict().keys()
    )
    folder = Path(shutil.copytree(trained, tmp_path / "exp" / "seed0"))
    (folder / "checkpoints" / "last.ckpt").unlink()
    detector.load(folder)
    (folder / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"exp: holds no checkpoints/last.ckpt; there are .*seed0"):
        detector.load(tmp_path / "exp")
    with pytest.raises(InputError, match=r"last\.ckpt: not a readable checkpoint"):
        detector.load(folder)
    with pytest.raises(InputError, match="no such checkpoint file"):
        detector.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="device warp:"):
        detector.load(CHECKPOINT, device="warp")


def test_views_are_those_of_predict(shipped, photo):
    assert rows(detector.load(CHECKPOINT, "cpu", flip=True)(photo)) != rows(shipped(photo))


def test_importing_takes_no_torch_and_types_are_there():
    code = (
        "import sys, detector; assert 'load' in detector.__all__; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False False\n"
    )
    with pytest.raises(AttributeError, match="nothing"):
        detector.nothing  # noqa: B018
    assert all((ROOT / package / "py.typed").is_file() for package in ("detector", "datamodules", "experiments"))


@pytest.mark.parametrize("module", [detections, loading])
def test_examples(module, photo, tmp_path, monkeypatch):
    shutil.copy(photo, tmp_path / "photo.jpg")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(module)
    assert results.attempted > 5 and results.failed == 0
