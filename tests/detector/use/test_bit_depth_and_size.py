"""`--data.bit_depth` and `--data.max_pixels`: what is read, what is refused before it is decoded, and who says so."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.doctor.examine import DoctorOptions, examine
from datamodules.image_cache import DiskCache, ImageFile
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.reader import VOCFormat
from detector.errors import InputError, printable
from detector.use.reading import Reading, read_header, read_image

TWELVE = Reading(bit_depth=12)
VALUES = np.array([[0, 15, 16, 2047], [2048, 4080, 4095, 256]], np.uint16)
SCALED = [[0, 0, 1, 127], [128, 255, 255, 16]]  # 12 bits: a sixteenth of the value


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_values_of_12_bits(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(VALUES).save(path)
    assert read_header(path).deep
    pixels = read_image(path, reading=TWELVE)
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 4, 3)
    assert pixels[..., 0].tolist() == pixels[..., 2].tolist() == SCALED
    assert read_image(path)[..., 1].tolist() == [[0, 0, 0, 7], [8, 15, 15, 1]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colours_of_12_bits(tmp_path, suffix):
    colors = np.stack([VALUES, VALUES[::-1], VALUES // 2], axis=2)
    path = tmp_path / f"a{suffix}"
    assert cv2.imwrite(str(path), colors[..., ::-1])
    assert read_header(path).deep
    expected = np.stack([np.array(SCALED), np.array(SCALED)[::-1], [[0, 0, 0, 63], [64, 127, 127, 8]]], axis=2)
    np.testing.assert_array_equal(read_image(path, reading=TWELVE), expected)
    np.testing.assert_array_equal(read_image(path), colors // 256)


def test_turned_colours_of_12_bits(tmp_path):
    """A quarter turn to the right, by a tag that Pillow follows in TIFF and another library may not."""
    colors = np.stack([VALUES] * 3, axis=2)
    assert cv2.imwrite(str(tmp_path / "a.tif"), colors, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    data = bytearray((tmp_path / "a.tif").read_bytes())
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    entries = [bytes(data[offset + 2 + 12 * i : offset + 14 + 12 * i]) for i in range(count)]
    entries = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != 274]
    entries = sorted([*entries, struct.pack("<HHIHH", 274, 3, 1, 6, 0)], key=lambda e: struct.unpack_from("<H", e)[0])
    data += b"\0" * (len(data) % 2)
    struct.pack_into("<I", data, 4, len(data))
    data += struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(data)
    assert read_header(tmp_path / "a.tif").upright_size == (2, 4)
    expected = np.rot90(np.array(SCALED), -1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", True, TWELVE)[..., 0], expected)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", True)[..., 0], np.rot90(VALUES >> 8, -1))


def test_values_beyond_the_stated_bits_are_no_picture(tmp_path):
    Image.fromarray(VALUES + np.uint16(4000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: .*values up to 8095, beyond 12 bits; data.bit_depth 13"):
        read_image(tmp_path / "a.png", reading=TWELVE)


def test_images_of_8_bits_are_what_they_are(tmp_path):
    Image.fromarray(np.array([[3, 200]], np.uint8)).save(tmp_path / "a.png")
    assert not read_header(tmp_path / "a.png").deep
    assert read_image(tmp_path / "a.png", reading=TWELVE)[..., 0].tolist() == [[3, 200]]


def test_pixels_on_disk_are_kept_for_each_bit_depth(tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "a.png")
    brightest = [
        DiskCache([ImageFile(tmp_path / "a.png", False, reading)], tmp_path / "cache")(0).max()
        for reading in (Reading(), TWELVE, Reading())
    ]
    assert brightest == [15, 255, 15]


@pytest.mark.parametrize("bits", [7, 17])
def test_bit_depths_that_there_are_not(bits):
    with pytest.raises(InputError, match=rf"data.bit_depth {bits}: must be in 8\.\.16"):
        Reading(bit_depth=bits)


def dataset(folder: Path, values: list[np.ndarray]) -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number, image in enumerate(values):
        Image.fromarray(image).save(folder / "JPEGImages" / f"{number}.png")
        (folder / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.png</filename><size><width>{image.shape[1]}</width>"
            f"<height>{image.shape[0]}</height><depth>1</depth></size><object><name>cell</name><bndbox><xmin>2</xmin>"
            "<ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
        )
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{n}\n" for n in range(len(values) - 1)))
    (folder / "ImageSets" / "Main" / "val.txt").write_text(f"{len(values) - 1}\n")
    return folder


def noise(seed: int, top: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (40, 50)).astype(np.uint16)


def dark(root: Path, bit_depth: int = 16) -> list[str]:
    report = examine(DoctorOptions(VOCFormat(root, reading=Reading(bit_depth))))
    return [problem.message for problem in report.problems if problem.kind == "dark_images"]


def test_the_doctor_sees_unused_bits(tmp_path):
    root = dataset(tmp_path / "d", [noise(0, 4096), noise(1, 1000), noise(2, 1000)])
    (message,) = dark(root)
    assert "its 3 images of 16 bits are below 4096, less than half of the range of 16 bits" in message
    assert "--data.bit_depth 12 " in message
    assert dark(root, 12) == []
    (message,) = dark(dataset(tmp_path / "ten", [noise(0, 1000), noise(1, 1000)]), 12)
    assert "below 1024" in message and "--data.bit_depth 10 " in message


def test_the_doctor_is_content_with_one_bright_image_or_with_8_bits(tmp_path):
    assert dark(dataset(tmp_path / "one", [noise(0, 4096), np.full((40, 50), 40000, np.uint16)])) == []
    assert dark(dataset(tmp_path / "eight", [noise(n, 60).astype(np.uint8) for n in range(2)])) == []


def test_training_and_validation_read_12_bits(tmp_path):
    root = dataset(tmp_path / "d", [noise(0, 4096), noise(1, 4096), noise(2, 4096)])
    options = {"train_splits": ["train"], "val_splits": ["val"], "num_workers": 0, "augmentation": "none"}
    for bits, low, high in ((16, 14, 15), (12, 250, 255)):
        data = VOCDataModule(str(root), bit_depth=bits, **options)
        data.setup("fit")
        for part in (data.train_dataset, data.val_dataset):
            assert low <= int(part[0][0].max()) <= high


# ---- max_pixels ----


def jpeg_bomb(path: Path, side: int = 65_500) -> Path:
    """A JPEG of a few hundred bytes whose header promises side x side pixels."""
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", side, side)
    path.write_bytes(data)
    return path


def png_bomb(path: Path, side: int = 65_500) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


@pytest.mark.parametrize("make", [jpeg_bomb, png_bomb])
def test_a_header_that_promises_too_much_is_refused_before_it_is_decoded(tmp_path, make):
    path = make(tmp_path / "bomb")
    assert (read_header(path).width, read_header(path).height) == (65_500, 65_500)
    with pytest.raises(InputError, match=r"bomb: has 65500 x 65500 pixels, 4,290,250,000 in all; at most 178,956,970"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp", ".gif", ".avif", ".jp2", ".ppm"])
def test_the_limit_holds_for_all_formats_and_can_be_raised(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow's own refuses twice as many
    if suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not read {suffix}")
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (20, 10), (40, 200, 90)).save(path)
    with pytest.raises(InputError, match=r"has 20 x 10 pixels, 200 in all.*data.max_pixels 200"):
        read_image(path, reading=Reading(max_pixels=199))
    assert read_image(path, reading=Reading(max_pixels=200)).shape == (10, 20, 3)
    assert Image.MAX_IMAGE_PIXELS == 50  # as it was, for whoever else uses Pillow


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp", ".gif", ".avif", ".jp2", ".ppm"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_damaged_files_of_any_format_are_no_image_or_still_one(tmp_path, suffix):
    if suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not read {suffix}")
    path, random = tmp_path / f"a{suffix}", np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (12, 16, 3)).astype(np.uint8)).save(path)
    whole = path.read_bytes()
    refused = 0
    for number in range(60):
        data = bytearray(whole[: random.integers(4, len(whole))] if number % 3 == 0 else whole)
        for place in random.integers(0, min(len(data), 400), 10):
            data[place] = random.integers(256)
        path.write_bytes(data)
        for read in (read_header, lambda path: read_image(path, True, Reading(max_pixels=10_000))):
            try:
                read(path)
            except InputError as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
    assert refused > 10


def test_a_training_names_large_images_before_its_first_step_also_when_their_headers_are_known(tmp_path):
    root = dataset(tmp_path / "d", [noise(0, 4096), noise(1, 4096), noise(2, 4096)])
    options = {"train_splits": ["train"], "val_splits": ["val"]}
    VOCDataModule(str(root), **options).setup("fit")  # keeps the headers
    with pytest.raises(InputError, match=r"0\.png: has 40 x 50|0\.png: has 50 x 40 pixels"):
        VOCDataModule(str(root), max_pixels=1999, **options).setup("fit")
    skipping = VOCDataModule(str(root), max_pixels=2000, on_error="skip", **options)
    skipping.setup("fit")
    assert len(skipping.train_dataset) == 2


def test_the_doctor_names_large_images(tmp_path):
    root = dataset(tmp_path / "d", [noise(0, 40000), np.zeros((60, 70), np.uint16)])
    report = examine(DoctorOptions(VOCFormat(root, reading=Reading(max_pixels=3000))))
    found = [problem.message for problem in report.problems if problem.kind == "unreadable_image"]
    assert len(found) == 1 and "1.png: has 70 x 60 pixels" in found[0]


# ---- names ----


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("käfer.jpg", "käfer.jpg"),
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        ("two\nlines", r"two\nlines"),
        ("\ud800", r"\ud800"),
    ],
)
def test_any_file_name_can_be_shown(name, shown):
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    assert printable(text) == shown
