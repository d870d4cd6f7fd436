"""Image files -> sizes and pixels.

A camera may store a photograph turned or mirrored, with an EXIF orientation that says how to show it. Boxes are in the
frame that the annotation tool showed: the stored pixels in older tools (VOC's own), the upright picture in most of
today's, browsers included. The image size that an annotation states tells the two apart, see `frame`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps

from detector.errors import InputError

ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image under whole boxes must be an error, not a training example

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says before its pixels.

    Args:
        width: stored pixels.
        height: stored pixels.
        orientation: EXIF orientation in 1..8; 1 is upright, from 5 on the picture is shown turned by a quarter.
    """

    width: int
    height: int
    orientation: int = 1

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) as shown."""
        return (self.width, self.height) if self.orientation < 5 else (self.height, self.width)


def read_header(path: Path) -> ImageHeader:
    """Size and orientation of an image file, without decoding it.

    Raises:
        InputError: if the file is no readable image.
    """
    try:
        with Image.open(path) as image:
            return ImageHeader(*image.size, _orientation(image))
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable image ({brief(error)})") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in stored pixels.

    Raises:
        InputError: as `read_header`.
    """
    header = read_header(path)
    return header.width, header.height


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
    """The frame that boxes refer to: (width, height) of the image, and whether its orientation has to be applied.

    It is the stored frame where the annotation states the size of the stored pixels and that of the upright picture
    differs, else the upright one; so upright also for half turns and mirrored pictures, which no size tells.

    Args:
        header: of the image.
        stated: (width, height) in the annotation; zeros where it states none.
    """
    stored = (header.width, header.height)
    if header.orientation == 1 or (stated == stored and stored != header.upright_size):
        return stored, False
    return header.upright_size, True


def read_image(path: Path, upright: bool = False) -> NDArray[np.uint8]:
    """Decode to RGB.

    Args:
        path: the file.
        upright: apply the EXIF orientation.

    Returns:
        uint8 (H, W, 3), contiguous; greyscale, palette and CMYK images are converted, transparency is dropped, and of
        16 bits the upper 8 are kept.

    Raises:
        InputError: if the file is missing, truncated or no image.
    """
    import torch  # here, because these take seconds to import, and sizes do not need them
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        data = path.read_bytes()
        if data[:2] == b"\xff\xd8":
            try:  # same pixels as PIL in three quarters of the time; whatever it refuses, PIL judges
                raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                decoded = decode_jpeg(raw, mode=ImageReadMode.RGB, apply_exif_orientation=upright)
                return np.ascontiguousarray(decoded.permute(1, 2, 0).numpy())
            except RuntimeError:
                pass
        with Image.open(io.BytesIO(data)) as image:
            turn = upright and _orientation(image) != 1
            return _rgb(ImageOps.exif_transpose(image) if turn else image)
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be decoded ({brief(error)}); replace the file") from error


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would turn all above 255 white
        grey = np.asarray(image).astype(np.int64)
        if grey.min(initial=0) < 0 or grey.max(initial=0) > 65535:
            raise ValueError("grey values beyond 16 bits")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels; 8 or 16 bits are needed")
    return np.array(image.convert("RGB"))


def brief(error: Exception) -> str:
    """The message of an error in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
