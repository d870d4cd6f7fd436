"""Pictures with the same content under different names: difference hashes find candidates, pixels decide.

The hash is dHash (N. Krawetz, "Kind of Like That", 2013): does grey increase from one pixel to the next, in the
picture scaled down to 9 x 8. Copies that were saved again or scaled keep it up to a few bits, but so do unlike pictures
of plain content; hence every candidate is compared by its pixels before it is called a copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.image_cache import ImageFile
from datamodules.image_reading import read_image
from detector.errors import InputError

MAX_BITS = 4
_THUMBNAIL = 32
_COMPARED = 128


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What is kept of a picture: its dHash of 64 bits, a grey thumbnail, uint8 (32, 32), and its height / width."""

    bits: int
    thumbnail: NDArray[np.uint8]
    aspect_ratio: float


def fingerprint(image: NDArray[np.uint8]) -> Fingerprint:
    """Return the fingerprint of a picture, uint8 (H, W, 3) RGB."""
    grey = _grey(image)
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    bits = int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")
    return Fingerprint(bits, _scaled(grey, _THUMBNAIL), image.shape[0] / image.shape[1])


def copies(files: list[ImageFile], prints: list[Fingerprint]) -> list[list[int]]:
    """Return groups of equal pictures: two or more positions, each ascending, in the order of their first one."""
    group = list(range(len(prints)))
    for first, second in _candidates(np.array([item.bits for item in prints], dtype=np.uint64)):
        one, two = sorted((group[first], group[second]))
        alike = 0.97 < prints[first].aspect_ratio / prints[second].aspect_ratio < 1 / 0.97
        alike = alike and _close(prints[first].thumbnail, prints[second].thumbnail)
        if one != two and alike and same_pixels(files[first], files[second]):
            group = [one if number == two else number for number in group]
    members: dict[int, list[int]] = {}
    for index, number in enumerate(group):
        members.setdefault(number, []).append(index)
    return [found for found in members.values() if len(found) > 1]


def same_pixels(first: ImageFile, second: ImageFile) -> bool:
    """Return whether two image files show the same, up to compression and scale: compared in grey at 128 x 128."""
    try:
        one, two = (_scaled(_grey(read_image(*file)), _COMPARED) for file in (first, second))
    except InputError:
        return False
    return _close(one, two)


def _close(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> bool:
    difference = first.astype(np.float32) - second.astype(np.float32)
    contrast = float(min(first.std(), second.std()))
    return float(np.sqrt(np.mean(difference**2))) <= 1.5 + 0.1 * contrast


def _candidates(bits: NDArray[np.uint64], rows: int = 256) -> Iterator[tuple[int, int]]:
    """Find pairs (i < j) whose hashes differ in at most `MAX_BITS` bits."""
    # As vectors of +1 and -1: their product is 64 less twice the number of bits in which they differ.
    signs = np.unpackbits(bits[:, None].view(np.uint8), axis=1).astype(np.float32) * 2 - 1
    for start in range(0, len(signs), rows):
        near = signs[start : start + rows] @ signs[start:].T >= 64 - 2 * MAX_BITS
        for row, column in zip(*np.nonzero(np.triu(near, 1)), strict=True):
            yield start + int(row), start + int(column)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _scaled(grey: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA), dtype=np.uint8)
