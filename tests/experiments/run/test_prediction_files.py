"""`frcnn predict` overwrites no file of the user's, neither an image nor anything else."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from detector.use.drawing import is_saved_picture, save_picture
from experiments.run.prediction_files import picture_names


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in written(folder)}


def test_images_of_equal_stem_have_pictures_of_their_own(run, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(photo) as image:
        for name in ("same.png", "same.jpg", "same.bmp", "SAME.webp", "alone.png"):
            image.save(folder / name)
    result = run(folder)
    assert result.code == 0, result.err
    pictures = ["SAME.webp.jpg", "alone.jpg", "same.bmp.jpg", "same.jpg.jpg", "same.png.jpg"]
    assert written(tmp_path / "out") == sorted([*pictures, "predictions.json"])
    assert run(folder).code == 0  # the same again replaces its own


@pytest.mark.parametrize(
    ("names", "pictures"),
    [
        (["a.png", "b/a.png"], ["a.jpg", "b/a.jpg"]),
        (["a.jpg", "a.png", "a.png.bmp"], ["a.jpg.jpg", "a.png.2.jpg", "a.png.jpg"]),
        (["x.png", "x.jpg/b.png"], ["x.png.jpg", "x.jpg/b.jpg"]),  # x.jpg is a folder
        (["cafe\u0301.png", "caf\u00e9.bmp"], ["cafe\u0301.png.jpg", "caf\u00e9.bmp.jpg"]),  # one name on some systems
        (["frame.001.png", "frame.002.png", "bare"], ["frame.001.jpg", "frame.002.jpg", "bare.jpg"]),
    ],
)
def test_names_of_pictures(names, pictures):
    assert picture_names(names) == pictures


@pytest.mark.parametrize("way", ["same", "dots", "link", "parent", "hard link", "linked file", "single", "own results"])
def test_no_file_of_the_user_is_overwritten(run, photo, tmp_path, way):
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    shutil.copy(photo, folder / "a.jpg")
    shutil.copy(photo, folder / "b.jpg")
    images, output = folder, tmp_path / "out"
    if way == "same":
        output = folder
    elif way == "dots":
        output = folder / ".." / "photos"
    elif way == "link":
        output.rmdir()
        output.symlink_to(folder)
    elif way == "parent":
        shutil.copy(photo, tmp_path / "b.jpg")  # another photograph of that name
        output = tmp_path
    elif way == "hard link":
        os.link(folder / "a.jpg", output / "a.jpg")
    elif way == "linked file":
        (output / "a.jpg").symlink_to(folder / "a.jpg")
    elif way == "single":
        images, output = folder / "a.jpg", folder
    else:
        (output / "predictions.json").write_text('{"mine": 1}')
    before = contents(tmp_path)
    result = run(images, output=output)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1 and "--output" in result.err
    assert contents(tmp_path) == before


def test_a_drawn_picture_that_is_an_input_now_is_not_overwritten(run, photo, tmp_path):
    assert run(photo).code == 0
    (picture,) = (tmp_path / "out").glob("*.jpg")
    assert is_saved_picture(picture)
    before = picture.read_bytes()
    assert run(picture).code == 2
    assert run("out", output="again").code == 0
    assert picture.read_bytes() == before


def test_an_evaluation_of_a_run_is_not_overwritten(run, photo, trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    before = (folder / "predictions.json").read_bytes()
    result = run(photo, output=folder)
    assert result.code == 2 and "predictions.json is there already" in result.err
    assert (folder / "predictions.json").read_bytes() == before


def test_pictures_below_the_images_are_no_images(run, photo, tmp_path):
    """A second run into a folder within that of the images does not find the pictures of the first."""
    folder = tmp_path / "photos"
    (folder / "out").mkdir(parents=True)
    shutil.copy(photo, folder / "a.jpg")
    shutil.copy(photo, folder / "out" / "mine.jpg")
    for _ in range(2):
        result = run(folder, output=folder / "out")
        assert result.code == 0, result.err
        assert "2 images" in result.out
    assert written(folder) == ["a.jpg", "out/a.jpg", "out/mine.jpg", "out/out/mine.jpg", "out/predictions.json"]
    assert (folder / "out" / "mine.jpg").read_bytes() == photo.read_bytes()


def test_a_file_that_appears_in_the_meantime_is_not_overwritten(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not overwritten"):
        save_picture(torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == b"mine"


def test_output_that_is_a_file(run, photo, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = run(photo)
    assert result.code == 2 and "no folder that can be written to" in result.err
