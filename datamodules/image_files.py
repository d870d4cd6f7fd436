"""Plain image files, without annotations, for prediction."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError, brief
from detector.use.reading import SUFFIXES, read_header

NOT_READ: Final = (
    *("heic", "heif", "hif", "jxl", "jxr", "svg", "psd", "xcf", "exr", "hdr", "ico", "eps", "wmf", "pcx", "sgi", "dds"),
    *("raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "pef", "srw"),
)
"""Suffixes of pictures that the reader cannot read."""
CAMERA: Final = re.compile(r"camera:(\d+)|(rtsp://.+)")
MOST_OF_A_CAMERA: Final = 1000  # frames
VIDEOS: Final = ("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv")


@dataclass
class FoundImages:
    """The images of a folder by their sorted paths within it, and by such a path why a picture is not among them.

    Of a video, or of a camera, they are its frames.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    video: Path | int | str | None = None

    def from_number(self, first: int) -> Iterator[Path | NDArray[np.uint8]]:
        """Yield the paths of the images from a number on; of a video the frames, (H, W, 3) RGB."""
        if self.video is None:
            yield from (self.folder / name for name in islice(self.names, first, None))
            return
        import cv2

        frames = cv2.VideoCapture(self.video if isinstance(self.video, int) else str(self.video))
        for number in range(len(self.names)):
            if not frames.grab():
                return
            if number >= first:
                yield np.ascontiguousarray(frames.retrieve()[1][:, :, ::-1])


def find_images(
    path: str | Path, ignore: Callable[[Path], bool] = lambda _: False, most: int | None = None
) -> FoundImages:
    """Find images: a file; all of a folder and its subfolders, also those that are linked; frames of a video.

    The path may also be a pattern such as `photos/**/*.png`, a text file with a path in each line, or a camera,
    `camera:0` or `rtsp://...`. Those to ignore are none to be found, such as pictures that were drawn earlier.

    Args:
        path: What to look at.
        ignore: Says of a file whether it is left out.
        most: The first so many are taken; None: all, of a camera 1,000.

    Raises:
        InputError: Nothing there, or no image.
    """
    found = _camera(camera, most) if (camera := CAMERA.fullmatch(str(path))) else _found(Path(path), ignore)
    del found.names[len(found.names) if most is None else most :]
    return found


def _found(path: Path, ignore: Callable[[Path], bool]) -> FoundImages:
    if path.is_file():
        suffix = path.suffix.lower().removeprefix(".")
        if suffix in VIDEOS:
            return _frames(path)
        return _listed(path) if suffix == "txt" else FoundImages(path.parent, [path.name])
    if not path.is_dir() and has_magic(str(path)):
        return _of_paths([Path(one) for one in sorted(glob(str(path), recursive=True)) if Path(one).is_file()], path)
    if not path.is_dir():
        raise InputError(f"{path}: no such image file or folder")
    found = FoundImages(path)
    for file in _files(path, found.left_out):
        name, suffix = str(file.relative_to(path)), file.suffix.lower().removeprefix(".")
        if file.name.startswith("._"):  # what macOS keeps beside a file on other systems' disks
            continue
        if suffix in NOT_READ:
            found.left_out[name] = f"images of the format {suffix} are not read; save it as JPEG or PNG"
        elif suffix in SUFFIXES and not file.is_file():
            found.left_out[name] = (
                "is a link to a file that is not there" if file.is_symlink() else "is no regular file"
            )
        elif (suffix in SUFFIXES or (not suffix and _is_image(file))) and not ignore(file):
            found.names.append(name)
    found.names.sort()
    if not found.names and not found.left_out:
        raise InputError(f"{path}: holds no image ({', '.join(SUFFIXES)})")
    return found


def _camera(found: re.Match[str], most: int | None) -> FoundImages:
    """Return frames that a camera will give, by the time of the first one: the next start finds others."""
    import cv2

    source = int(found[1]) if found[1] else found[2]
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(0)  # what it says of a camera that is not there
    try:
        if not cv2.VideoCapture(source).isOpened():
            raise InputError(f"{found[0]}: there is no such camera, or another program has it")
    finally:
        cv2.utils.logging.setLogLevel(level)
    folder = time.strftime("camera-%Y%m%d-%H%M%S")
    numbers = range(1, (MOST_OF_A_CAMERA if most is None else most) + 1)
    return FoundImages(Path(), [f"{folder}/{number:06d}.jpg" for number in numbers], video=source)


def _frames(video: Path) -> FoundImages:
    import cv2

    count = int(cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT))
    if count < 1:
        raise InputError(f"{video}: is no video that can be read")
    return FoundImages(video.parent, [f"{video.stem}/{number:06d}.jpg" for number in range(1, count + 1)], video=video)


def _listed(file: Path) -> FoundImages:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is no list of images, a path in each line ({brief(error)})") from error
    return _of_paths([file.parent / line for line in lines if line], file)


def _of_paths(paths: Sequence[Path], source: Path) -> FoundImages:
    """Return files by their names below the folder that all of them are in, each once."""
    if not paths:
        raise InputError(f"{source}: no such image file or folder")
    every = list(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))
    folder = Path(os.path.commonpath([path.parent for path in every]))
    return FoundImages(folder, [str(path.relative_to(folder)) for path in every])


def _files(folder: Path, left_out: dict[str, str]) -> Iterator[Path]:
    """Find all files below a folder; each linked folder once, so that a link to a folder above ends."""

    def unreadable(error: OSError) -> None:
        left_out[str(Path(str(error.filename)).relative_to(folder))] = f"cannot be looked into ({error.strerror})"

    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(parent) / name for name in files)


def _is_image(file: Path) -> bool:
    """Return whether a file without a suffix is an image, by its content."""
    try:
        return file.is_file() and read_header(file).width > 0
    except InputError:
        return False
