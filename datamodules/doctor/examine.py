"""What is wrong with a dataset in VOC format, file by file, and what is in it: `examine`.

Each image is checked as a training checks it (`voc.check`), but decoded whole, and files that no split names are looked
at too. Then come the questions about many images at once: splits, copies, classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.checks import similar_classes
from datamodules.doctor.near_duplicates import Fingerprint, copies, fingerprint
from datamodules.doctor.splits import PARTS, ImageKey, SplitTable, UsedSplit, read_split_table, split_problems
from datamodules.image_cache import ImageFile
from datamodules.image_reading import USUAL, Reading, read_header, read_image
from datamodules.parallel import map_files
from datamodules.problems import Problem
from datamodules.voc.check import CheckedImage, check_image
from datamodules.voc.format import IMAGE_SUFFIXES
from datamodules.voc.layout import VOC_CLASSES, annotated_members, check_root, dataset_folders, is_plain
from datamodules.voc.names import annotation_path
from detector.errors import InputError

PARALLEL_FROM = 64  # images, which are decoded


@dataclass(frozen=True)
class DoctorOptions:
    """What to examine.

    Args:
        root: as `--data.root` of a training.
        splits: splits by part ("train", "val", "test"); none: everything, with the parts of splits by their names.
        class_names: the known classes; None: the 20 VOC classes for VOC years, else those found.
        images: whether images are expected and looked at.
        reading: how image files are read.
    """

    root: Path
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    images: bool = True
    reading: Reading = USUAL


@dataclass(frozen=True, eq=False)
class Examined:
    """One image: what a training would find, and what it looks like (None if it was not decoded).

    Args:
        member: which one.
        image: what a training would find.
        print: what it looks like.
        brightest: of an image of 16-bit values the largest one as it is decoded, in 0..255.
    """

    member: ImageKey
    image: CheckedImage
    print: Fingerprint | None
    brightest: int | None = None

    @property
    def file(self) -> Path:
        """The file by which problems of the image as a whole name it."""
        return self.image.path or self.annotation

    @property
    def annotation(self) -> Path:
        return annotation_path(self.member.folder, self.member.stem)


@dataclass(frozen=True, eq=False)
class Report:
    """What was found.

    Args:
        images: number of images with an annotation file.
        objects: number of their objects, unusable ones included.
        image_files: number of image files that belong to an annotation or a split.
        empty: number of images whose annotation lists no object.
        classes: objects by class name, difficult ones included.
        difficult: difficult objects by class name.
        class_images: images by class name.
        boxes: float32 (G, 4), the usable boxes, clipped to their images.
        splits: number of images by split.
        problems: everything wrong.
    """

    images: int
    objects: int
    image_files: int
    empty: int
    classes: dict[str, int]
    difficult: dict[str, int]
    class_images: dict[str, int]
    boxes: NDArray[np.float32]
    splits: dict[str, int]
    problems: list[Problem]


def examine(options: DoctorOptions) -> Report:
    """Examine a dataset.

    Args:
        options: what.

    Raises:
        InputError: There is no dataset, or a split that is asked for does not exist.
    """
    root = options.root.expanduser()
    check_root(root)
    known = options.class_names
    if known is not None and len(set(known)) < len(known):
        raise InputError(f"--data.class_names names a class twice: {', '.join(known)}")
    if known is None and not is_plain(root):
        known = VOC_CLASSES
    table = read_split_table(root, options.splits)
    splits_of = table.by_member()
    folders = dataset_folders(root)
    stored = {folder: _images_in(folder) if options.images else set() for folder in folders}
    without = [folder for folder in folders if not stored[folder]]
    there = {ImageKey(folder, stem) for folder in folders for stem in stored[folder]}
    there |= {ImageKey(folder, member.stem) for folder in folders for member in annotated_members(folder)}
    members = sorted(splits_of if table.chosen else there.union(splits_of))
    jobs = [(member, member.folder not in without) for member in members]
    examine_one = partial(_examine_one, class_names=known, reading=options.reading)
    found = map_files(examine_one, jobs, "examining", parallel_from=PARALLEL_FROM)
    problems = [
        *(problem for one in found for problem in _problems_of(one, not table.splits or one.member in splits_of)),
        *(_no_images(folder) for folder in without if options.images),
        *split_problems(table, {one.member: one.file for one in found}),
        *_copies(found, splits_of, options.reading),
        *_dark_images(root, found, options.reading.bit_depth),
    ]
    report = _report(found, table, known)
    problems += _class_problems(root, found, report, known)
    order = {file: index for index, file in enumerate(sorted({problem.file for problem in problems}))}
    problems.sort(key=lambda problem: (order[problem.file], -1 if problem.object is None else problem.object))
    return replace(report, problems=problems)


def _images_in(folder: Path) -> set[str]:
    """Names without suffix of the files in a dataset folder's JPEGImages/."""
    images = folder / "JPEGImages"
    paths = [path.relative_to(images) for path in images.rglob("*") if path.suffix in IMAGE_SUFFIXES]
    return {path.with_suffix("").as_posix() for path in paths if not path.name.startswith(".")}


def _examine_one(job: tuple[ImageKey, bool], class_names: Sequence[str] | None, reading: Reading) -> Examined:
    member, look = job
    image = check_image(member.folder, member.stem, class_names, look, reading)
    if image.path is None or any(problem.kind == "unreadable_image" for problem in image.problems):
        return Examined(member, image, None)
    try:
        pixels = read_image(image.path, image.upright, reading)
        brightest = int(pixels.max()) if read_header(image.path).deep else None
        return Examined(member, image, fingerprint(pixels), brightest)
    except InputError as error:
        problem = Problem(str(image.path), None, "truncated_image", str(error))
        return Examined(member, replace(image, problems=(*image.problems, problem)), None)


def _problems_of(one: Examined, used: bool) -> list[Problem]:
    return list(one.image.problems) if used else [replace(problem, used=False) for problem in one.image.problems]


def _no_images(folder: Path) -> Problem:
    place = folder / "JPEGImages"
    text = f"{place}: holds no image, so none was looked at (--no_images examines the annotations alone)"
    return Problem(str(place), None, "missing_image", text)


def _dark_images(root: Path, found: Sequence[Examined], bit_depth: int) -> Iterator[Problem]:
    """Values of 16 bits that use less than half of their range: those of a camera of fewer bits, most often."""
    levels = [one.brightest for one in found if one.brightest is not None]
    if not levels or max(levels) >= 128:
        return
    needed = bit_depth - 8 + max(levels).bit_length()
    likely = next(bits for bits in (8, 10, 12, 14, 16) if bits >= needed)
    text = (
        f"{root}: all values of its {len(levels)} images of 16 bits are below {2**needed}, less than half of the range "
        f"of {bit_depth} bits; --data.bit_depth {likely} makes use of it, if the camera has {likely} bits"
    )
    yield Problem(str(root), None, "dark_images", text)


def _copies(
    found: Sequence[Examined], splits_of: Mapping[ImageKey, Sequence[UsedSplit]], reading: Reading
) -> Iterator[Problem]:
    """Pictures with equal content: a leak if they are in splits that must not share images, else a duplicate.

    Of a leak the file of the training split is named, as the one to leave out."""

    def rank(index: int) -> int:
        parts = [PARTS.index(part) for split in splits_of.get(seen[index][0].member, []) for part in split.parts]
        return -max(parts, default=-1)

    seen = [(one, one.image.path, one.print) for one in found if one.image.path is not None and one.print is not None]
    files = [ImageFile(path, one.image.upright, reading) for one, path, _ in seen]
    for group in copies(files, [print_ for _, _, print_ in seen]):
        group.sort(key=rank)
        for position, index in enumerate(group[1:], start=1):
            one, path, _ = seen[index]
            mine = splits_of.get(one.member, [])
            others = [seen[other][0] for other in group[:position]]
            leaks = [
                (other, theirs.label, split.label)
                for other in others
                for theirs in splits_of.get(other.member, [])
                for split in mine
                if split.excludes(theirs)
            ]
            if leaks:
                other, theirs_label, label = leaks[0]
                text = f"{path}: shows what {other.file} shows; the one is in {label}, the other in {theirs_label}"
                yield Problem(str(path), None, "leak_by_content", text)
            else:
                yield Problem(str(path), None, "duplicate_image", f"{path}: shows what {others[0].file} shows")


def _class_problems(
    root: Path, found: Sequence[Examined], report: Report, known: Sequence[str] | None
) -> Iterator[Problem]:
    for name in known or ():
        if not report.classes.get(name):
            text = f"{root}: no object of the class {name!r}"
            yield Problem(str(root), None, "class_without_objects", text)
    similar = {} if known is not None else similar_classes(report.classes)
    for one in found if similar else ():
        for item in one.image.objects:
            if item.name in similar:
                path = one.annotation
                text = f"{path}: object {item.index} is of the class {item.name!r}, like {similar[item.name]!r}"
                yield Problem(str(path), item.index, "similar_class", text)


def _report(found: Sequence[Examined], table: SplitTable, known: Sequence[str] | None) -> Report:
    classes, difficult, class_images = Counter[str](), Counter[str](), Counter[str]()
    for one in found:
        classes.update(item.name for item in one.image.objects if item.name)
        difficult.update(item.name for item in one.image.objects if item.name and item.difficult)
        class_images.update({item.name for item in one.image.objects if item.name})
    names = [*(known or ()), *sorted(set(classes) - set(known or ()))]
    boxes = [item.box for one in found for item in one.image.objects if item.box is not None]
    return Report(
        images=sum(one.image.annotated for one in found),
        objects=sum(len(one.image.objects) for one in found),
        image_files=sum(one.image.path is not None for one in found),
        empty=sum(problem.kind == "empty_image" for one in found for problem in one.image.problems),
        classes={name: classes[name] for name in names},
        difficult={name: difficult[name] for name in names},
        class_images={name: class_images[name] for name in names},
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        splits={split.label: len(split.members) for split in table.splits},
        problems=[],
    )
