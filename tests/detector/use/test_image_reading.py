import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.errors import InputError
from detector.use.reading import ImageHeader, frame, read_header, read_image

HEIGHT, WIDTH = 24, 40
SHOWN = {  # what a viewer does with the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def picture() -> np.ndarray:
    """Smooth, so that JPEG keeps it, and without any symmetry."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 10, columns * 6, (rows + 2 * columns) * 2], axis=2).astype(np.uint8)


def save(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture()).save(path, exif=exif, **({"quality": 98} if path.suffix == ".jpg" else {}))
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_pixels_as_stored_and_as_shown(tmp_path, orientation, suffix):
    path = save(tmp_path / f"a{suffix}", orientation)
    header = read_header(path)
    assert header == ImageHeader(WIDTH, HEIGHT, orientation)
    stored, shown = read_image(path), read_image(path, upright=True)
    expected = SHOWN[orientation](picture())
    assert header.upright_size == (expected.shape[1], expected.shape[0])
    for pixels, wanted in ((stored, picture()), (shown, expected)):
        assert pixels.shape == wanted.shape and pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
        assert np.abs(pixels.astype(int) - wanted).mean() < (0.1 if suffix == ".png" else 6)


def test_tiff_is_turned_by_pillow_once(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(picture()).save(path, tiffinfo={274: 6})
    header = read_header(path)
    assert header.upright_size == (header.width, header.height)
    assert frame(header, (0, 0))[0] == read_image(path).shape[1::-1]


@pytest.mark.parametrize(
    ("orientation", "stated", "expected"),
    [
        (1, (24, 40), ((40, 24), False)),  # no tag: whatever the annotation states
        (6, (40, 24), ((40, 24), False)),  # the stored pixels were annotated
        (6, (24, 40), ((24, 40), True)),  # the picture as shown was annotated
        (6, (0, 0), ((24, 40), True)),  # not stated
        (8, (1024, 768), ((24, 40), True)),  # stated wrongly
        (3, (40, 24), ((40, 24), True)),  # a half turn, which no size tells
    ],
)
def test_the_stated_size_tells_which_frame_was_annotated(orientation, stated, expected):
    assert frame(ImageHeader(40, 24, orientation), stated) == expected


def test_a_square_picture_is_upright():
    assert frame(ImageHeader(40, 40, 6), (40, 40)) == ((40, 40), True)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path, suffix):
    grey = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 65).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / f"a{suffix}")
    pixels = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(pixels, np.repeat((grey // 256)[:, :, None], 3, axis=2))
    assert 200 < pixels.max() < 255  # not white, as a plain conversion makes it


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    image = Image.fromarray(picture()).convert("L").convert("LA" if mode == "LA" else "L")
    if mode in ("RGBA", "CMYK"):
        image = Image.fromarray(picture()).convert(mode)
    elif mode not in ("L", "LA"):
        image = image.convert(mode)
    image.save(tmp_path / f"a{suffix}")
    pixels = read_image(tmp_path / f"a{suffix}")
    assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8
    if mode == "RGBA":
        np.testing.assert_array_equal(pixels, picture())
    elif mode != "CMYK":
        grey = np.array(image.convert("L"))
        np.testing.assert_array_equal(pixels, np.repeat(grey[:, :, None], 3, axis=2))


def test_what_cannot_be_read_is_named(tmp_path):
    Image.fromarray(np.full((5, 7), 0.5, np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"float\.tif: .*floating-point pixels; 8 or 16 bits"):
        read_image(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"text\.jpg: not a readable image"):
        read_header(tmp_path / "text.jpg")
    for read in (read_header, read_image):
        with pytest.raises(InputError, match=r"text\.jpg: .*\(no image of a known format\)"):
            read(tmp_path / "text.jpg")
    with pytest.raises(InputError, match=r"gone\.jpg"):
        read_image(tmp_path / "gone.jpg")


def test_programs_that_look_like_pictures_are_not_run(tmp_path, monkeypatch):
    """Pillow gives PostScript, whatever the file is called, to Ghostscript."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program is started"))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert Image.open(tmp_path / "a.jpg").format == "EPS"
    for read in (read_header, read_image):
        with pytest.raises(InputError, match="no image of a known format"):
            read(tmp_path / "a.jpg")


def test_damaged_exif_is_no_reason_to_refuse_a_picture(tmp_path):
    path = save(tmp_path / "a.jpg", 6)
    data = path.read_bytes()
    start = data.index(b"Exif\0\0") + 6
    path.write_bytes(data[:start] + b"\xff" * 12 + data[start + 12 :])
    assert read_header(path) == ImageHeader(WIDTH, HEIGHT, 1)
    assert read_image(path).shape == (HEIGHT, WIDTH, 3)
