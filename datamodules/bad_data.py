"""What a training does about bad data: `--data.on_error raise` stops with all of it, `skip` goes on without it.

What is looked for before the first step: everything in annotations, missing images, headers of images, and images that
are cut short. Damage inside an image shows only when it is decoded: `raise` stops then, and under `skip` the next image
of the split that can be decoded takes its place (`NextImageInstead`). That depends on nothing but the files, so it is
the same on all ranks and in all workers, and when a run is resumed; an evaluation counts images by their numbers, so it
leaves the undecodable one out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, Final, Literal, cast

from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.image_reading import read_image
from datamodules.problems import Problem
from detector.errors import InputError

OnError = Literal["raise", "skip"]
SHOWN: Final = 20  # problems in a message


def settle(problems: Sequence[Problem], on_error: OnError, images: int, report: Path | None) -> None:
    """Stop because of problems, or say that and where they are skipped.

    Args:
        problems: all problems of the images that are about to be used; those that break nothing are ignored.
        on_error: raise or skip.
        images: number of images that are left out because of them.
        report: file for the list of what is skipped; None: a temporary file.

    Raises:
        InputError: `on_error` is raise and there is something to stop for. Its message names the first problem and the
            number of other files, its details list all.
    """
    broken = [problem for problem in problems if problem.breaks]
    if not broken:
        return
    if on_error == "skip":
        _say_what_is_skipped(broken, images, report)
        return
    files = len({problem.file for problem in broken})
    more = f" (and {files - 1} more files with problems)" if files > 1 else ""
    error = InputError(f"{broken[0].message}{more}")
    error.details = _details(broken) if len(broken) > 1 else ()
    raise error


def ends_properly(image: Path) -> bool:
    """Whether a JPEG or PNG file has its end mark; False for other formats, which only decoding can judge."""
    with image.open("rb") as file:
        start = file.read(8)
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 64))
        end = file.read()
    if start[:2] == b"\xff\xd8":
        return end.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    return start == b"\x89PNG\r\n\x1a\n" and b"IEND\xaeB`\x82" in end


def find_cut_images(images: Iterable[tuple[Path, bool]]) -> list[Problem]:
    """The images that are cut short: those whose end mark is missing, and that cannot be decoded.

    Args:
        images: files, and whether their EXIF orientation is applied.
    """
    found: list[Problem] = []
    for path, upright in images:
        try:
            if not ends_properly(path):
                read_image(path, upright)
        except (InputError, OSError) as error:
            found.append(Problem(str(path), None, "truncated_image", str(error)))
    return found


def write_problems(problems: Iterable[Problem], path: Path) -> None:
    """Write problems as JSON, a list with the keys of `Problem.document`.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([problem.document for problem in problems], indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{path}: the list of bad data cannot be written ({error.strerror})") from error


def _details(broken: Sequence[Problem]) -> tuple[str, ...]:
    lines = [f"{problem.kind}: {problem.message}" for problem in broken[:SHOWN]]
    if len(broken) > SHOWN:
        where = _write_aside(broken)
        lines.append(f"... and {len(broken) - SHOWN} more" + (f"; all {len(broken)} are in {where}" if where else ""))
    return (*lines, "--data.on_error skip leaves these out; frcnn doctor says more about the dataset")


@rank_zero_only
def _write_aside(broken: Sequence[Problem]) -> Path | None:
    """Not into a run folder: there will be no run."""
    path = _temporary()
    write_problems(broken, path)
    return path


def _temporary() -> Path:
    with tempfile.NamedTemporaryFile(prefix="frcnn_data_problems_", suffix=".json", delete=False) as file:
        return Path(file.name)


@rank_zero_only
def _say_what_is_skipped(broken: Sequence[Problem], images: int, report: Path | None) -> None:
    objects = {(problem.file, problem.object) for problem in broken if problem.object is not None}
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(problem.kind for problem in broken).items())
    path = report or _temporary()
    write_problems(broken, path)
    print(
        f"--data.on_error skip: leaves out {images} images and {len(objects)} objects ({kinds}); the list is in {path}",
        file=sys.stderr,
    )


class NextImageInstead(Dataset[tuple[Tensor, Any]]):
    """A dataset in which the next decodable image takes the place of one that cannot be decoded.

    Args:
        dataset: raises `InputError` for samples whose image cannot be decoded.
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, Any]]) -> None:
        self.dataset = dataset
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Any]:
        """As that of the dataset. Raises InputError if no image can be decoded."""
        epoch, first = key if isinstance(key, tuple) else (0, key)
        for step in range(len(self)):
            index = (first + step) % len(self)
            try:
                return self.dataset[cast(int, (epoch, index))]
            except InputError as error:
                if index not in self._told:
                    self._told.add(index)
                    print(f"--data.on_error skip: {error}; the next image takes its place", file=sys.stderr)
        raise InputError("--data.on_error skip: not one image of the split can be decoded")
