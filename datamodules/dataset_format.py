"""What a format of datasets has to say, and the records in which it says it, before anything becomes an array."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from datamodules.file_cache import FileCache, cache_folder
from datamodules.problems import Kind, Problem
from detector.errors import InputError, shortened
from detector.use.reading import USUAL, Reading

Box = tuple[float, float, float, float]
Id = int | str  # as a file states it, but for a float such as 7.0, which is 7


@dataclass(frozen=True)
class Member:
    """An image as a split names it.

    Args:
        name: Its name within the dataset, as lists of made splits hold it.
        folder: The dataset's (VOC) or the image's (COCO).
        stem: The image within the folder.
        source: The file that names it.
    """

    name: str
    folder: Path
    stem: str
    source: Path

    @property
    def image(self) -> tuple[Path, str]:
        """Return which image it is, whatever names it."""
        return self.folder, self.stem


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """One object of an annotation, usable or not.

    Args:
        index: Its number in the annotation file, from 0.
        name: Class name; empty where there is none.
        box: xyxy in pixels, as stated or, once judged, clipped to the image; None if it cannot be used.
        difficult: Ignored by the evaluation.
    """

    index: int
    name: str
    box: Box | None
    difficult: bool = False


@dataclass(frozen=True)
class Stated:
    """What an annotation states of one image, before it is judged.

    Args:
        file: The annotation file.
        thing: What the file calls an object, such as "object {}".
        size: (width, height) of the image; zeros where none is stated.
        objects: All objects, those that cannot be read without a box; None if the annotation cannot be read as a whole.
        problems: What was wrong while reading.
        image: The image, where the file holds the annotations of several.
        annotated: Whether there is an annotation, readable or not.
        result_id: What results of detections call the image; None: its position.
    """

    file: Path
    thing: str
    size: tuple[int, int] = (0, 0)
    objects: list[ObjectRecord] | None = None
    problems: list[Problem] = field(default_factory=list)
    image: str = ""
    annotated: bool = True
    result_id: Id | None = None

    def problem(self, kind: Kind, text: str, item: ObjectRecord | None = None, named: bool = True) -> Problem:
        """Return a problem of the image, or of one of its objects, which the message names or not."""
        if item is None:
            return Problem(str(self.file), None, kind, f"{self.file}: {self.image}{' ' * bool(self.image)}{text}")
        beside = f" ({shortened(item.name)}{', ' * bool(self.image)}{self.image})" if named else ""
        message = f"{self.file}: {self.thing.format(item.index)}{beside} {text}"
        return Problem(str(self.file), item.index, kind, message)


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image with its objects, and everything that is wrong with it.

    Args:
        path: The image file; None if it is missing or was not looked for.
        name: What results call the image.
        objects: All objects of the annotation.
        upright: Apply the EXIF orientation; without it the boxes refer to the stored pixels.
        size: (width, height) in that frame, of the image or else as stated; zeros where neither is known.
        problems: Everything wrong with it.
        usable: Whether it can be trained on, perhaps without some of its objects.
        stated: What its annotation states.
    """

    path: Path | None
    name: str
    objects: Sequence[ObjectRecord] = ()
    upright: bool = False
    size: tuple[int, int] = (0, 0)
    problems: Sequence[Problem] = ()
    usable: bool = True
    stated: Stated = Stated(Path(), "object {}")


class DatasetFormat(ABC):
    """Where the images and annotations of a dataset are, and how they are read.

    One's own derives from `datamodules.own_format.OwnFormat`, which needs two methods of it.
    """

    name: str = ""
    """What `--data_format` calls it: a word, or the class path of one's own."""
    cache_kind: ClassVar[type[FileCache]] = FileCache
    """What is kept of the files that were read."""
    needs_splits: str = ""
    """What has to be named, because there is no way to list all images of the dataset; empty where there is."""

    def __init__(self, root: str | Path, reading: Reading = USUAL) -> None:
        self.root = Path(root).expanduser()
        self._said: set[str] = set()
        self.read_by(None, reading)

    def read_by(self, annotation_cache: str | None, reading: Reading) -> None:
        """Set where what is read is kept, as `--data.annotation_cache` says, and how images are read."""
        self.reading = reading
        self.cache_folder = cache_folder(annotation_cache)
        self._caches: dict[Path, FileCache] = {}

    def cache(self, folder: Path) -> FileCache:
        """Return what is kept of the files of a dataset folder."""
        if folder not in self._caches:
            self._caches[folder] = self.cache_kind(folder, self.cache_folder, self.reading)
        return self._caches[folder]

    def say(self, line: str) -> None:
        """Say something once, by one process."""
        from pytorch_lightning.utilities import rank_zero_only  # here, because it takes seconds to import

        if line not in self._said:
            self._said.add(line)
            rank_zero_only(print)(line, file=sys.stderr)

    @abstractmethod
    def offered(self) -> list[str] | None:
        """Return the names of the splits that the root offers; None where it looks like no dataset of this format.

        Only names of files, and the beginnings of a few of them, are looked at.
        """

    def check_root(self) -> None:
        """Raise InputError unless the root is a folder."""
        if not self.root.is_dir():
            raise InputError(f"--data.root {self.root}: no such folder")

    def other_format(self) -> str:
        """Return the end of a message: which of the formats that are loaded the root looks like, if not like this."""
        ours = [kind for kind in DatasetFormat.__subclasses__() if kind.name and kind is not type(self)]
        for kind in ours if self.offered() is None else ():
            with suppress(InputError):  # a file that is that format's business
                if kind(self.root).offered() is not None:
                    return f"; it looks like --data_format {kind.name}"
        return ""

    @abstractmethod
    def class_names(self, splits: Sequence[str], everything: bool = False) -> list[str]:
        """Return the classes where none are given, in label order.

        Args:
            splits: Names of splits.
            everything: Look at all annotations of the dataset where splits do not state the classes.
        """

    @abstractmethod
    def list_images(self, splits: Sequence[str], missing_ok: bool = False, repeats: bool = False) -> list[Member]:
        """Return the images that splits name, in order.

        Args:
            splits: Names of splits.
            missing_ok: Leave out splits that are not there instead of raising InputError.
            repeats: Accept a split that names an image more than once.
        """

    @abstractmethod
    def list_others(self, members: Iterable[Member], look: bool) -> list[Member]:
        """Return the annotated images that are not among `members`; if `look`, those without an annotation too."""

    @abstractmethod
    def read(
        self, members: Sequence[Member], class_names: Sequence[str] | None, look: bool = True
    ) -> list[ImageRecord]:
        """Read and judge the annotations and headers of images, and return a record for each, in order.

        None for the known classes accepts all names; without `look` images are not looked for.
        """

    def image_names(self, members: Sequence[Member]) -> tuple[str, ...]:
        """Return what images are called, without suffix."""
        return tuple(member.stem for member in members)

    def category_ids(self, splits: Sequence[str], class_names: Sequence[str]) -> Sequence[Id] | None:
        """Return what the files of splits call the classes; None: 1..C, and images by position."""
        return None

    # ---- for the doctor, who looks at everything ----

    own_annotations: ClassVar[bool] = False
    """Whether each split has annotations of its own, also of images that another one names."""

    def all_splits(self) -> list[str]:
        """Return the names of all splits that the dataset has."""
        return self.offered() or []

    @abstractmethod
    def split_file(self, split: str) -> Path:
        """Return the file of a split, whether it is there or not; raise InputError where none can be meant."""

    @abstractmethod
    def empty_folders(self, members: Iterable[Member]) -> list[Path]:
        """Return the folders that should hold the images of `members`, and hold none at all."""

    def known_classes(self, splits: Sequence[str]) -> Sequence[str] | None:
        """Return the classes that the dataset has by definition, or that the files of splits state; None: any."""
        return None

    def forget(self) -> None:
        """Free what was only needed for reading."""
        self._caches = {}
