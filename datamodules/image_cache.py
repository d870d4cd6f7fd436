"""Decoded images kept in memory or on disk, so that only the first epoch decodes them.

Each cache is filled when an image is first asked for, by whichever process asks: a run starts as soon as without one.
"""

import contextlib
import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.file_cache import ENVIRONMENT_VARIABLE, cache_folder
from detector.errors import InputError
from detector.files import replacing
from detector.use.reading import USUAL, Reading, read_image

CacheKind = Literal["none", "memory", "disk"]
CACHE_KINDS: Final = get_args(CacheKind)
MEMORY_SHARE: Final = 0.8  # of the memory that is free; the rest is for training


class ImageFile(NamedTuple):
    """An image file, whether its EXIF orientation is applied, and how it is read."""

    path: Path
    upright: bool
    reading: Reading = USUAL


class ImageReader(Protocol):
    """A source of the pixels of a dataset's images."""

    def __call__(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of image `index`: uint8 (H, W, 3) RGB, not to be written to."""


class Decoder:
    """A reader that decodes each time."""

    def __init__(self, files: Sequence[ImageFile]) -> None:
        self.files = files

    def __call__(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of image `index`."""
        return read_image(*self.files[index])


class MemoryCache:
    """Decoded pixels in memory that this process and its workers share, without copies and without /dev/shm.

    Sizes are (height, width); so many training processes on this machine keep such a cache.

    Raises:
        InputError: The images need more memory than there is. Where worker processes are not forked, when they start.
    """

    def __init__(self, files: Sequence[ImageFile], sizes: NDArray[np.int64], processes: int = 1) -> None:
        self.decoder, self.sizes = Decoder(files), sizes
        lengths = 3 * sizes.prod(1)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        total, free = int(self.starts[-1]), available_memory()
        if free is not None and total * processes > MEMORY_SHARE * free:
            times = f" in each of {processes} processes" if processes > 1 else ""
            raise InputError(
                f"--data.cache_images memory: the {len(sizes)} decoded images need {total / 1e9:.1f} GB{times}, of "
                f"{free / 1e9:.1f} GB that are free; use --data.cache_images disk or none"
            )
        # Anonymous shared pages: forked workers see what any of them writes, and nothing is used before it is written.
        self.pixels = np.frombuffer(mmap.mmap(-1, max(1, total)), np.uint8)
        self.done = np.frombuffer(mmap.mmap(-1, max(1, len(sizes))), np.uint8)

    def __call__(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of image `index`."""
        shape = (*self.sizes[index], 3)
        place = self.pixels[self.starts[index] : self.starts[index + 1]].reshape(shape)
        if not self.done[index]:
            image = self.decoder(index)
            if image.shape != shape:  # the file was replaced meanwhile
                return image
            place[:] = image  # two workers at once write the same bytes
            self.done[index] = 1
        place.flags.writeable = False
        return place

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise InputError(
            "--data.cache_images memory needs worker processes that are forked, which this system or strategy does not "
            "do; use --data.cache_images disk"
        )


class DiskCache:
    """Decoded pixels as one .npy file for each image, in a folder that is made if needed, which later runs use too.

    A file's name is a hash of the image's path, size in bytes, time of change, orientation and bit depth: a changed
    image is decoded anew.

    Raises:
        InputError: The folder cannot be written to, or the disk is full.
    """

    def __init__(self, files: Sequence[ImageFile], folder: Path) -> None:
        self.decoder, self.files, self.folder = Decoder(files), files, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--data.image_cache_dir {folder}: cannot be made ({error.strerror})") from error

    def __call__(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of image `index`."""
        path = self._path(index)
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or cut off
            image: NDArray[np.uint8] = np.load(path)
            return image
        image = self.decoder(index)
        self._write(path, image)
        return image

    def _path(self, index: int) -> Path:
        source, upright, reading = self.files[index]
        try:
            state = source.stat()
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({error.strerror})") from error
        key = f"{source.resolve()}|{state.st_size}|{state.st_mtime_ns}|{upright}"
        key += "" if reading.bit_depth == 16 else f"|{reading.bit_depth}"
        name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.npy"

    def _write(self, path: Path, image: NDArray[np.uint8]) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as file:  # whole or not at all, also for workers that read at the same time
                np.save(file, image)
        except OSError as error:
            raise InputError(
                f"--data.cache_images disk: cannot write to {self.folder} ({error.strerror}); make room, give another "
                "--data.image_cache_dir, or use --data.cache_images none"
            ) from error


def check_cache(kind: CacheKind, folder: str | None) -> Path | None:
    """Return the folder of a cache on disk, None for the other kinds; raise InputError for bad values."""
    if kind not in CACHE_KINDS:
        raise InputError(f"--data.cache_images is {kind!r}; choose one of {', '.join(CACHE_KINDS)}")
    if kind != "disk":
        return None
    if folder is not None:
        return Path(folder).expanduser()
    base = cache_folder()
    if base is None:
        raise InputError(
            f"--data.cache_images disk: {ENVIRONMENT_VARIABLE} says that nothing is to be kept; give a folder by "
            "--data.image_cache_dir"
        )
    return base / "images"


def make_reader(
    kind: CacheKind, files: Sequence[ImageFile], sizes: NDArray[np.int64], folder: str | None, processes: int
) -> ImageReader:
    """Make the reader that `--data.cache_images` asks for; arguments and errors are those of the caches."""
    place = check_cache(kind, folder)
    if kind == "memory":
        return MemoryCache(files, sizes, processes)
    return Decoder(files) if place is None else DiskCache(files, place)


def available_memory() -> int | None:
    """Return the bytes that can still be used, within the control group's limit; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free
