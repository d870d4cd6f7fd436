"""A dataset format of one's own: say which splits there are and what is in their images, and all else is done here."""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from datamodules.checks import judge
from datamodules.dataset_format import Box, DatasetFormat, ImageRecord, Member, ObjectRecord, Stated
from datamodules.problems import Kind, Problem
from detector.errors import InputError, brief, listed, shortened
from detector.use.reading import ImageHeader

_KINDS: Final[dict[str, Kind]] = {
    "which is not four finite numbers": "incomplete_object",
    "whose width or height is not positive": "negative_box",
}


@dataclass(frozen=True)
class LabelledImage:
    """An image and its `G` objects.

    Args:
        path: The image file; relative to the root of the dataset, or absolute.
        boxes: (G, 4) xyxy in pixels of the upright image, continuous: the width is x2 - x1, and a box of the whole
            image is (0, 0, width, height). What is outside is cut off; what is wrong stops a training.
        names: (G,) names of classes.
        difficult: (G,) whether an object is ignored by the evaluation; empty: none is.
        relative: Boxes are shares of the image's width and height, in 0..1, instead of pixels.
        size: (width, height) of the image that the boxes were drawn in, where that is stated; only commands that do
            without the image files, such as an audit of anchors, need it.

    Raises:
        ValueError: Not as many names or flags as boxes, or a name that is no text.
    """

    path: str | Path
    boxes: Sequence[Sequence[float]]
    names: Sequence[str]
    difficult: Sequence[bool] = ()
    relative: bool = False
    size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Check what is said of the objects."""
        counts = [len(self.boxes), len(self.names), len(self.difficult) or len(self.boxes)]
        if len({*counts}) > 1:
            raise ValueError(f"{self.path}: has {counts[0]} boxes, {counts[1]} names and {len(self.difficult)} flags")
        if wrong := [name for name in self.names if not isinstance(name, str) or not name]:
            raise ValueError(f"{self.path}: {wrong[0]!r} is no name of a class")


class OwnFormat(DatasetFormat):
    """The base class of formats of one's own: `--data_format my_package.MyFormat`.

    Its constructor may take more than the root, with types and defaults: `--data_format.delimiter ";"`.

    Args:
        root: As `--data.root`.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self._split_of: dict[str, list[LabelledImage]] = {}

    @abstractmethod
    def splits(self) -> Sequence[str]:
        """Return the names of the splits that the root offers, such as train, val and test."""

    @abstractmethod
    def images(self, split: str) -> Iterable[LabelledImage]:
        """Return the images of a split, one of `splits()`, with their objects, in an order that is always the same."""

    def split_file(self, split: str) -> Path:
        """Return the file that states what is in a split, for messages; the root where that is not known."""
        return self.root

    def offered(self) -> list[str] | None:
        """Return the names of the splits; None where there are none."""
        with self._told("splits()"):
            return list(self.splits()) or None

    def class_names(self, splits: Sequence[str], everything: bool = False) -> list[str]:
        """Return the sorted names of the classes in all splits, so that labels do not depend on those that are used."""
        return sorted({name for split in self.offered() or [] for image in self._images(split) for name in image.names})

    def list_images(self, splits: Sequence[str], missing_ok: bool = False, repeats: bool = False) -> list[Member]:
        """Return the images of splits, in order."""
        there = self.offered() or []
        unknown = [split for split in splits if split not in there]
        if unknown and not missing_ok:
            raise InputError(f"{self.root}: has no split {unknown[0]!r}; there are {listed(there) or 'none'}")
        members: list[Member] = []
        for split in filter(there.__contains__, splits):
            of_split = [self._member(split, image) for image in self._images(split)]
            twice = [member.name for member, count in Counter(of_split).items() if count > 1]
            if twice and not repeats:
                raise InputError(f"{self.split_file(split)}: names the image {twice[0]} more than once in {split!r}")
            members += of_split
        return members

    def list_others(self, members: Iterable[Member], look: bool) -> list[Member]:
        """Return the images of all splits that are not among `members`."""
        known = {member.image for member in members}
        others = {member.image: member for member in self.list_images(self.offered() or [], repeats=True)}
        return [member for image, member in others.items() if image not in known]

    def read(
        self, members: Sequence[Member], class_names: Sequence[str] | None, look: bool = True
    ) -> list[ImageRecord]:
        """Judge what is stated of images, and read their headers."""
        paths = [member.folder / member.stem for member in members]
        headers = self.cache(self.root).headers([path for path in paths if path.is_file()] if look else [])
        images = [(split, image) for split in self.offered() or [] for image in self._images(split)]
        stated_of = {(self.split_file(split), self.root / image.path): (split, image) for split, image in images}
        records: list[ImageRecord] = []
        for member, path in zip(members, paths, strict=True):
            header = headers.get(path)
            stated = self._stated(*stated_of[member.source, path], header)
            if look and header is None:
                stated.problems.append(Problem(str(path), None, "missing_image", f"{path}: no such image"))
            records.append(judge(stated, member.name, path if header is not None else None, header, class_names))
        return records

    def image_names(self, members: Sequence[Member]) -> tuple[str, ...]:
        """Return the names of the images within the dataset, without suffix."""
        return tuple(member.name.rpartition(".")[0] or member.name for member in members)

    def empty_folders(self, members: Iterable[Member]) -> list[Path]:
        """Return the root if not one of the images is there."""
        return [] if any((member.folder / member.stem).is_file() for member in members) else [self.root]

    def forget(self) -> None:
        """Free what was only needed for reading."""
        super().forget()
        self._split_of = {}

    def _images(self, split: str) -> list[LabelledImage]:
        if split not in self._split_of:
            with self._told(f"images({split!r})"):
                self._split_of[split] = list(self.images(split))
        return self._split_of[split]

    def _member(self, split: str, image: LabelledImage) -> Member:
        path = self.root / image.path
        name = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        return Member(name.as_posix(), path.parent, path.name, self.split_file(split))

    def _stated(self, split: str, image: LabelledImage, header: ImageHeader | InputError | None) -> Stated:
        width, height = image.size
        size = header.upright_size if isinstance(header, ImageHeader) and min(width, height) <= 0 else (width, height)
        objects: list[ObjectRecord] = []
        stated = Stated(self.split_file(split), "object {}", size, objects, image=str(image.path))
        for index, (name, values) in enumerate(zip(image.names, image.boxes, strict=True)):
            box = _box(values, size if image.relative else (1, 1))
            difficult = len(image.difficult) > 0 and bool(image.difficult[index])
            item = ObjectRecord(index, name, box if isinstance(box, tuple) else None, difficult)
            if isinstance(box, str):
                text = f"has the box {shortened(str(values))}, {box}; x1, y1, x2, y2 are needed"
                stated.problems.append(stated.problem(_KINDS[box], text, item))
            objects.append(item)
        return stated

    @contextmanager
    def _told(self, call: str) -> Iterator[None]:
        """Raise what one's own code raises as an InputError of one line."""
        try:
            yield
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            reason = f"{type(error).__name__}: {brief(error)}"
            raise InputError(f"--data_format {self.name}: {call}: {reason}") from error


def _box(values: Sequence[float], unit: tuple[int, int]) -> Box | str | None:
    """Return a box in pixels, or what is wrong with it; None where the size of its image is not known."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        return "which is not four finite numbers"
    if numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return "whose width or height is not positive"
    x1, y1, x2, y2 = (number * side for number, side in zip(numbers, unit * 2, strict=True))
    return (x1, y1, x2, y2) if min(unit) > 0 else None
