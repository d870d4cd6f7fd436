"""Images of any kind that Python has -> the pixels that a detector was trained on: uint8 RGB (3, H, W), upright."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detector.errors import InputError, brief
from detector.use.reading import Reading, read_image, read_pillow, upper_bits

Picture = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor
"""A path; an image of Pillow's; an array (H, W), (H, W, 1), (H, W, 3), (H, W, 4); a tensor with channels first."""
_KINDS: Final = "give a path, an image of Pillow's, an array (H, W, 3), a tensor (3, H, W), or an iterable of these"


def several(images: Picture | Iterable[Picture]) -> Iterable[Picture] | None:
    """Return images one by one; None for a single image, such as an array or a tensor of two or three dimensions.

    Raises:
        InputError: It is neither.
    """
    if isinstance(images, Tensor | np.ndarray):
        if images.ndim != 4:
            return None
        values = _eight_bits(_channels_last(images), 16) if _is_float(images) else images
        return list(values)  # floats are in 0..1 or 0..255 for all images of a batch
    if isinstance(images, str | os.PathLike | Image.Image):
        return None
    if isinstance(images, Iterable):
        return images
    raise InputError(f"image: {_KINDS}; not {type(images).__name__}")


def pixels_of(image: Picture, reading: Reading) -> Tensor:
    """Return the pixels of an image: uint8 (3, H, W) RGB, contiguous, upright.

    Alpha is dropped, grey becomes RGB, and of 16 bits the upper 8 of `reading.bit_depth` are kept, as in training.
    Floats up to 1 mean 0..1, others 0..255; they are rounded to the 8 bits that trainings see.

    Raises:
        InputError: It is no image, or one whose shape or values have no clear meaning.
    """
    try:
        if isinstance(image, str | os.PathLike):
            found = read_image(Path(image), True, reading)
        elif isinstance(image, Image.Image):
            found = read_pillow(image, reading.bit_depth)
        elif isinstance(image, Tensor | np.ndarray):
            found = _rgb(_eight_bits(_channels_last(image), reading.bit_depth))
        else:
            raise ValueError(f"{_KINDS}; not {type(image).__name__}")
    except InputError:
        raise
    except Exception as error:  # Pillow's images may be of damaged files, which raise anything
        raise InputError(f"image: {brief(error)}") from error
    return torch.from_numpy(found.transpose(2, 0, 1).copy())


def _is_float(values: Tensor | NDArray[Any]) -> bool:
    return values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"


def _channels_last(image: Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return an image (H, W, C) or a batch (B, H, W, C) of tensors, which have channels first, or of arrays.

    Raises:
        ValueError: The channels are elsewhere, or not 1, 3 or 4.
    """
    shape, is_tensor = tuple(image.shape), isinstance(image, Tensor)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if image.ndim == 2:
        image = image[:, :, None]
    elif is_tensor and image.ndim > 2:
        image = np.moveaxis(image, -3, -1)
    if image.ndim not in (3, 4) or image.shape[-1] not in (1, 3, 4) or not image.size:
        wanted = (
            "(3, H, W), (4, H, W), (1, H, W) or (H, W)" if is_tensor else "(H, W, 3), (H, W, 4), (H, W, 1) or (H, W)"
        )
        raise InputError(f"image: {'a tensor' if is_tensor else 'an array'} of shape {shape}; it must be {wanted}")
    return image


def _eight_bits(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return values of a type that images have as 0..255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return upper_bits(values, bits)
    if values.dtype.kind != "f":
        raise InputError(f"image: values of type {values.dtype}; give uint8, uint16, or floats in 0..1 or 0..255")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # nor for nan
        raise InputError(
            f"image: values from {low:g} to {high:g}; floats must be in 0..1 or 0..255, before any normalisation"
        )
    return np.rint(values * 255.0 if high <= 1 else values).astype(np.uint8)


def _rgb(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values[:, :, :3]
