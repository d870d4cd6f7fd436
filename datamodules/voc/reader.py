"""VOCFormat: the images and annotations of a dataset in PASCAL VOC format, found, read and judged."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import ClassVar, cast

from datamodules.checks import judge
from datamodules.dataset_format import DatasetFormat, ImageRecord, Member, ObjectRecord, Stated
from datamodules.file_cache import FileCache
from datamodules.problems import Kind, Problem
from datamodules.voc.annotation_cache import AnnotationCache
from datamodules.voc.format import (
    Annotation,
    NegativeBoxError,
    UnreadObject,
    VOCObject,
    parse_annotation_loosely,
    read_annotation_bytes,
)
from datamodules.voc.layout import (
    ImageFinder,
    dataset_folders,
    find_split,
    image_folders,
    images_in,
    is_plain,
    part_folders,
)
from datamodules.voc.names import annotated_names, annotation_path, annotations_folder, read_split_lines
from detector import VOC_CLASSES
from detector.errors import InputError, listed, shortened


class VOCFormat(DatasetFormat):
    """A dataset in PASCAL VOC format: VOC<year>/ folders, or one dataset folder."""

    name = "voc"
    cache_kind: ClassVar[type[FileCache]] = AnnotationCache

    def cache(self, folder: Path) -> AnnotationCache:
        """Return what is kept of a dataset folder's annotations and images."""
        return cast(AnnotationCache, super().cache(folder))

    @property
    def plain(self) -> bool:
        """Return whether the root is itself a dataset folder."""
        return is_plain(self.root)

    @property
    def needs_splits(self) -> str:  # type: ignore[override]
        """Return whether splits must be named: years have several lists of images each."""
        return "" if self.plain else "split, such as 2007_trainval"

    def known_classes(self, splits: Sequence[str]) -> Sequence[str] | None:
        """Return the 20 VOC classes for VOC years."""
        return None if self.plain else VOC_CLASSES

    def check_root(self) -> None:
        """Raise InputError unless the root is, or holds, a dataset folder."""
        if not self.root.is_dir():
            raise InputError(
                f"--data.root {self.root}: no such folder; `frcnn mini-voc OUT_DIR` writes a small synthetic dataset, "
                "--data.download true fetches VOC years"
            )
        if not dataset_folders(self.root):
            raise InputError(
                f"--data.root {self.root}: holds neither VOC<year>/ nor JPEGImages/, Annotations/ and ImageSets/Main/, "
                f"nor images beside XML files{self.other_format()}"
            )

    def class_names(self, splits: Sequence[str], everything: bool = False) -> list[str]:
        """Return the 20 VOC classes for VOC years, else the sorted names found in annotations."""
        files = [find_split(self.root, name) for name in splits]
        if not self.plain:
            return list(VOC_CLASSES)
        stems = {stem for split in files for stem in split.names()}
        stems |= set(annotated_names(self.root)) if everything else set()
        annotations = self.cache(self.root).annotations(sorted(stems))
        found: set[str] = set()
        for stem, annotation in annotations.items():
            read = _loosely(annotation_path(self.root, stem), annotation)
            if not isinstance(read, InputError):
                found |= {item.name for item in read[1] if isinstance(item, VOCObject)}
        if not found:
            raise _no_classes(self.root, [split.path for split in files], annotations)
        return sorted(found)

    def list_images(self, splits: Sequence[str], missing_ok: bool = False, repeats: bool = False) -> list[Member]:
        """Return the images that split files name, in order."""
        files = [find_split(self.root, name) for name in splits]
        there = [split for split in files if split.path.exists() or not missing_ok]
        return [member for split in there for member in self._members(split.folder, split.names(repeats), split.path)]

    def _members(self, folder: Path, stems: Iterable[str], source: Path) -> list[Member]:
        # Years hold equal names of different images.
        above = "" if self.plain else f"{folder.name}/"
        return [Member(f"{above}{stem}", folder, stem, source) for stem in stems]

    def read(
        self, members: Sequence[Member], class_names: Sequence[str] | None, look: bool = True
    ) -> list[ImageRecord]:
        """Read and judge annotations and the headers of images, both by way of what is kept of them."""
        records: list[ImageRecord] = []
        finders = functools.cache(ImageFinder)  # by folder
        for folder, group in groupby(members, key=lambda member: member.folder):
            stems = [member.stem for member in group]
            annotations = self.cache(folder).annotations(stems)
            stated = {stem: _stated(self.cache(folder).paths[stem], annotations[stem]) for stem in stems}
            images: dict[str, Path] = {}
            finder = finders(folder)
            for stem, (one, file_name) in stated.items() if look else ():
                try:
                    images[stem] = finder.find(stem, file_name)
                except InputError as error:
                    image = finder.place / f"{stem}.jpg"
                    one.problems.append(Problem(str(image), None, "missing_image", str(error)))
            headers = self.cache(folder).headers(images.values())
            for stem in stems:
                path = images.get(stem)
                name = f"{stem}{'.jpg' if path is None else path.suffix}"
                records.append(judge(stated[stem][0], name, path, headers[path] if path else None, class_names))
        return records

    def offered(self) -> list[str] | None:
        """Return the names of all split files but those of single classes ("name  1"), else of folders such as train/.

        None where there is no dataset folder.
        """
        folders = dataset_folders(self.root)
        found = [
            ("" if self.plain else f"{folder.name.removeprefix('VOC')}_") + path.stem
            for folder in folders
            for path in sorted((folder / "ImageSets" / "Main").glob("*.txt"))
            if not _is_of_one_class(path)
        ]
        return (found or [name for folder in folders for name in part_folders(folder)]) if folders else None

    def split_file(self, split: str) -> Path:
        """Return the file of a split."""
        return find_split(self.root, split).path

    def list_others(self, members: Iterable[Member], look: bool) -> list[Member]:
        """Return the annotations that are not among `members`, and the images if `look`."""
        known = {member.image for member in members}
        others: list[Member] = []
        for folder in dataset_folders(self.root):
            stems = {*annotated_names(folder), *(images_in(folder) if look else ())}
            others += self._members(folder, sorted(stems), annotations_folder(folder))
        return [member for member in others if member.image not in known]

    def empty_folders(self, members: Iterable[Member]) -> list[Path]:
        """Return the folders of images that hold none."""
        return [image_folders(folder)[0] for folder in dataset_folders(self.root) if not images_in(folder)]


def _loosely(
    path: Path, annotation: Annotation | InputError
) -> tuple[Annotation, Sequence[VOCObject | UnreadObject]] | InputError:
    """Return an annotation and all its objects. One in which something is wrong is not kept, so it is read again."""
    if isinstance(annotation, Annotation):
        return annotation, annotation.objects
    try:
        return parse_annotation_loosely(read_annotation_bytes(path), path)
    except InputError as error:
        return error


def _stated(path: Path, annotation: Annotation | InputError) -> tuple[Stated, str]:
    """Return what an annotation states, and the file name that it states for its image."""
    read = _loosely(path, annotation)
    if isinstance(read, InputError):
        there = os.path.exists(path)
        kind: Kind = "unreadable_annotation" if there else "missing_annotation"
        return Stated(path, "object {}", problems=[Problem(str(path), None, kind, str(read))], annotated=there), ""
    whole, objects = read
    found = [
        ObjectRecord(index, item.name, item.box if isinstance(item, VOCObject) else None, item.difficult)
        for index, item in enumerate(objects)
    ]
    stated = Stated(path, "object {}", (whole.width, whole.height), found)
    name = whole.file_name.replace("\\", "/").rsplit("/", 1)[-1]
    if path.stem not in (name, Path(name).stem):
        text = f"states the file name {shortened(whole.file_name)}, not its own"
        stated.problems.append(stated.problem("file_name_mismatch", text))
    for index, item in enumerate(objects):
        if isinstance(item, UnreadObject):
            kind = "negative_box" if isinstance(item.error, NegativeBoxError) else "incomplete_object"
            stated.problems.append(Problem(str(path), index, kind, str(item.error)))
    return stated, whole.file_name


def _is_of_one_class(path: Path) -> bool:
    """Return whether the first lines all state whether the image shows the class of the file."""
    try:
        lines = read_split_lines(path, most=20)
    except InputError:
        return False
    return bool(lines) and all(line.flagged for line in lines)


def _no_classes(
    folder: Path, split_files: Sequence[Path], annotations: Mapping[str, Annotation | InputError]
) -> InputError:
    """Return the error to raise where no annotation names an object: the first true cause.

    Args:
        folder: The dataset folder.
        split_files: Those whose images the annotations are of; none: all annotations of the folder.
        annotations: By name, each read or the reason why it was not.
    """
    there = [f"{name}.xml" for name in annotated_names(folder)]
    place = annotations_folder(folder)
    for path in filter(Path.is_file, split_files):
        for line in read_split_lines(path):
            if not os.path.isfile(annotation_path(folder, line.name)):
                return InputError(
                    f"{path}: line {line.number} is {shortened(line.text)!r}, but there is no "
                    f"{annotation_path(folder, line.name)}; {place} holds "
                    f"{listed(there, 3) or 'no XML file'}"
                )
            found = annotations.get(line.name)
            if isinstance(found, InputError):
                return found
    if not there:
        return InputError(f"{place}: holds no XML file, so there are no images to train on")
    bad = next((one for one in annotations.values() if isinstance(one, InputError)), None)
    where = "of the splits " if split_files else ""
    return bad or InputError(f"{folder}: no annotation {where}names an object, so there are no classes")
