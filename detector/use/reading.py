"""Image files -> sizes and pixels: the one reader of training, evaluation, prediction, pictures and the doctor.

A camera may store a photograph turned or mirrored, with an EXIF orientation that says how to show it. Boxes are in the
frame that the annotation tool showed: the stored pixels in older tools (VOC's own), the upright picture in most of
today's, browsers included. The image size that an annotation states tells the two apart, see `frame`.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from detector.errors import InputError, brief

ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image under whole boxes must be an error, not a training example

SUFFIXES: Final = (
    *("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff"),
    *("gif", "jfif", "jpe", "avif", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "tga", "apng"),
)
"""Of the files that are taken for images where a folder is looked through; of animations the first picture counts."""


FORMATS: Final = frozenset(
    ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")  # as Pillow calls them
)
"""That are read, whatever the suffix: others, such as EPS, may run programs of their own."""


@dataclass(frozen=True)
class Reading:
    """How image files are read.

    Args:
        bit_depth: Bits of the values in 16-bit images: those of a 12-bit camera go up to 4095 and would be nearly black
            among 65,536. Images of 8 bits are what they are.
        max_pixels: Images with more pixels (width x height) than that are refused, before they are decoded: a file of
            a few kB can hold an image that fills the memory.
    """

    bit_depth: int = 16
    max_pixels: int = 178_956_970

    def __post_init__(self) -> None:
        if not 8 <= self.bit_depth <= 16:
            raise InputError(f"data.bit_depth {self.bit_depth}: must be in 8..16")
        if self.max_pixels < 1:
            raise InputError(f"data.max_pixels {self.max_pixels}: must be at least 1")

    def check_size(self, path: Path, width: int, height: int) -> None:
        """Raise InputError for an image with more pixels than `max_pixels`."""
        if width * height > self.max_pixels:
            raise InputError(
                f"{path}: has {width} x {height} pixels, {width * height:,} in all; at most {self.max_pixels:,} are "
                f"read, unless data.max_pixels {width * height} allows for it"
            )


USUAL: Final = Reading()


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says before its pixels.

    Args:
        width: stored pixels.
        height: stored pixels.
        orientation: EXIF orientation in 1..8; 1 is upright, from 5 on the picture is shown turned by a quarter.
        deep: whether its values have 16 bits.
    """

    width: int
    height: int
    orientation: int = 1
    deep: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        """Return (width, height) as shown."""
        return (self.width, self.height) if self.orientation < 5 else (self.height, self.width)


def read_header(path: Path) -> ImageHeader:
    """Read size and orientation of an image file, without decoding it and whatever its size.

    Raises:
        InputError: if the file is no readable image.
    """
    try:
        with _opened(path) as image:
            return _header(image)
    except Exception as error:  # damaged files raise anything
        raise InputError(f"{path}: not a readable image ({_why(error)})") from error


def _why(error: Exception) -> str:
    return "no image of a known format" if isinstance(error, UnidentifiedImageError) else brief(error)


def _header(image: Image.Image) -> ImageHeader:
    return ImageHeader(*image.size, _orientation(image), _is_deep(image))


_pillow = threading.Lock()
_readers = 0
_limit: int | None = None


@contextmanager
def _opened(source: Path | io.BytesIO) -> Iterator[Image.Image]:
    """Open an image with Pillow, without Pillow's own limit on pixels, which no option could raise."""
    global _readers, _limit
    with _pillow:
        if not _readers:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        Image.init()
        with Image.open(source, formats=sorted(FORMATS & Image.OPEN.keys())) as image:
            yield image
    finally:
        with _pillow:
            _readers -= 1
            if not _readers:
                Image.MAX_IMAGE_PIXELS = _limit


def _orientation(image: Image.Image) -> int:
    # Pillow turns TIFF images itself; of a PNG without the tag it would decode all pixels in search of it.
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises anything; every viewer shows such a picture as it is stored
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def frame(header: ImageHeader, stated: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    """Return the frame that boxes refer to: (width, height), and whether the image's orientation has to be applied.

    It is the stored frame where the annotation states the size (width, height) of the stored pixels and that of the
    upright picture differs, else the upright one; so upright also for half turns and mirrored pictures, which no size
    tells, and where the annotation states none: zeros.
    """
    stored = (header.width, header.height)
    if header.orientation == 1 or (stated == stored and stored != header.upright_size):
        return stored, False
    return header.upright_size, True


def read_image(path: Path, upright: bool = False, reading: Reading = USUAL) -> NDArray[np.uint8]:
    """Decode to RGB, uint8 (H, W, 3), contiguous; `upright` applies the EXIF orientation.

    Greyscale, palette and CMYK images are converted, transparency is dropped, of 16 bits the upper 8 of
    `reading.bit_depth` are kept, and of an animation the first picture.

    Raises:
        InputError: if the file is missing, truncated, no image or too large.
    """
    try:
        data = path.read_bytes()
        with _opened(io.BytesIO(data)) as image:
            reading.check_size(path, *image.size)
            header = _header(image)
            pixels = _decode_jpeg(data) if data[:2] == b"\xff\xd8" else None
            if pixels is None:
                pixels = _rgb(image, data, reading.bit_depth)
    except InputError:
        raise
    except Exception as error:  # damaged files raise anything
        raise InputError(f"{path}: cannot be decoded ({_why(error)}); replace the file") from error
    return np.ascontiguousarray(_turned(pixels, header.orientation)) if upright else pixels


def read_pillow(image: Image.Image, bits: int) -> NDArray[np.uint8]:
    """Return an image of Pillow's, upright, as `read_image` does its file.

    Raises:
        ValueError: It has values that are none of an image.
    """
    if bits < 16 and _is_deep(image) and "I" not in image.mode:
        raise ValueError(f"of 16-bit colours Pillow gives the upper 8, not those of {bits}; give the path")
    return np.ascontiguousarray(_turned(_rgb(image, b"", bits), _orientation(image)))


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Decode to Pillow's pixels in three quarters of its time; None for what is refused, which Pillow then judges."""
    import torch  # here, because these take seconds to import, and sizes do not need them
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        decoded: NDArray[np.uint8] = decode_jpeg(raw, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
        return np.ascontiguousarray(decoded)
    except RuntimeError:
        return None


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn stored pixels so that they are as shown."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _is_deep(image: Image.Image) -> bool:
    """Return whether the file has 16 bits for each value; of colours Pillow gives the upper 8."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return True
    tiles = getattr(image, "tile", None)
    args: Any = tiles[0][3] if tiles else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    return isinstance(raw, str) and ";16" in raw


def _rgb(image: Image.Image, data: bytes, bits: int) -> NDArray[np.uint8]:
    if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would turn all above 255 white
        return np.repeat(upper_bits(np.asarray(image), bits)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels; 8 or 16 bits are needed")
    if bits < 16 and _is_deep(image):
        return _deep_colors(data, bits)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; without a warning
    return np.array(image.convert("RGB"))


def _deep_colors(data: bytes, bits: int) -> NDArray[np.uint8]:
    import cv2

    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16:
        raise ValueError("its 16-bit colours are in a form that is not known")
    colors = found[:, :, None] if found.ndim == 2 else found
    colors = np.repeat(colors[:, :, :1], 3, axis=2) if colors.shape[2] < 3 else colors[:, :, 2::-1]
    return np.ascontiguousarray(upper_bits(colors, bits))


def upper_bits(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the upper 8 of so many bits."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high >= 2**bits:
        found = f"values {low if low < 0 else f'up to {high}'}, beyond {bits} bits"
        fitting = max(high.bit_length(), 8)
        raise ValueError(found + (f"; data.bit_depth {fitting} has room for them" if fitting <= 16 else ""))
    return (values >> (bits - 8)).astype(np.uint8)
