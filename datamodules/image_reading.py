"""Image files -> sizes and pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from detector.errors import InputError

ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image under whole boxes must be an error, not a training example


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode to RGB.

    Returns:
        uint8 (H, W, 3), contiguous; greyscale, palette and CMYK images are converted.

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
                decoded = decode_jpeg(raw, mode=ImageReadMode.RGB)
                return np.ascontiguousarray(decoded.permute(1, 2, 0).numpy())
            except RuntimeError:
                pass
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be decoded ({brief(error)}); replace the file") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in stored pixels, from the file's header.

    Raises:
        InputError: if the file is no readable image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({brief(error)})") from error


def brief(error: Exception) -> str:
    """The message of an error in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
