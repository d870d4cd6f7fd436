"""Pictures with the same content under different names: difference hashes find candidates, pixels decide.

The hash is dHash (N. Krawetz, "Kind of Like That", 2013): does grey increase from one pixel to the next, in the
picture scaled down to 9 x 8. Copies that were saved again or scaled keep it up to a few bits, but so do unlike pictures
of plain content; hence every candidate is compared by its pixels before it is called a copy.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.file_cache import FileCache, Row
from datamodules.image_cache import ImageFile
from detector.errors import InputError
from detector.use.reading import read_image

PARALLEL_FROM: Final = 64  # images, which are decoded
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
    groups = [[index] for index in range(len(prints))]  # by position; positions of a group share one list
    compared = lru_cache(maxsize=8192)(_compared)  # 16 kB each
    for first, second in _candidates(np.array([item.bits for item in prints], dtype=np.uint64)):
        if groups[first] is groups[second]:
            continue
        ratio = prints[first].aspect_ratio / prints[second].aspect_ratio
        if not 0.97 < ratio < 1 / 0.97 or not _close(prints[first].thumbnail, prints[second].thumbnail):
            continue
        one, two = compared(files[first]), compared(files[second])
        if one is not None and two is not None and _close(one, two):
            smaller, larger = sorted((groups[first], groups[second]), key=len)
            larger += smaller
            for index in smaller:
                groups[index] = larger
    return sorted(map(sorted, {id(group): group for group in groups if len(group) > 1}.values()))


def _compared(file: ImageFile) -> NDArray[np.uint8] | None:
    """Return what is compared of an image file, so that compression and scale do not count: grey at 128 x 128."""
    try:
        return _scaled(_grey(read_image(*file)), _COMPARED)
    except InputError:
        return None


class FingerprintCache(FileCache):
    """Fingerprints of the images of one dataset folder, kept between runs: each image is decoded once."""

    kind: ClassVar[str] = "fingerprints"
    readers: ClassVar[tuple[str, ...]] = (*FileCache.readers, __file__)

    def groups(self, files: Sequence[ImageFile]) -> list[list[ImageFile]]:
        """Return the groups of two or more images that show the same; those that cannot be decoded are in none."""
        wanted = {
            file: (file.path, f"{self._key(file.path)} {file.upright} {file.reading.bit_depth}") for file in files
        }
        rows = self._of_images(wanted, _fingerprint_row, "looking for equal images", PARALLEL_FROM)
        prints = {file: _from_row(*row) for file, row in rows.items() if not isinstance(row, InputError)}
        readable = list(prints)
        return [[readable[index] for index in group] for group in copies(readable, list(prints.values()))]


def _fingerprint_row(file: ImageFile) -> Row | InputError:
    try:
        found = fingerprint(read_image(*file))
    except InputError as error:
        return error
    return [found.bits, b64encode(found.thumbnail.tobytes()).decode("ascii"), found.aspect_ratio]


def _from_row(bits: int, thumbnail: str, aspect_ratio: float) -> Fingerprint:
    pixels = np.frombuffer(b64decode(thumbnail), np.uint8).reshape(_THUMBNAIL, _THUMBNAIL)
    return Fingerprint(bits, pixels, aspect_ratio)


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
