"""What is wrong with a dataset, file by file, and what is in it: `examine`.

Each image is checked as a training checks it, but decoded whole, and files that no split names are looked at too. Then
come the questions about many images at once: splits, copies, classes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.checks import check_classes, similar_classes
from datamodules.dataset_format import DatasetFormat, ImageRecord, Member
from datamodules.doctor.near_duplicates import PARALLEL_FROM, Fingerprint, copies, fingerprint
from datamodules.doctor.splits import Image, SplitTable, UsedSplit, read_split_table, split_problems, table_of_made
from datamodules.image_cache import ImageFile
from datamodules.parallel import map_files
from datamodules.problems import Problem
from datamodules.splits import PARTS, Splits
from detector.errors import InputError
from detector.use.reading import read_header, read_image


@dataclass(frozen=True)
class DoctorOptions:
    """What to examine.

    Args:
        format: The dataset.
        splits: Splits by part ("train", "val", "test"); none: everything, with the parts of splits by their names.
        class_names: The known classes; None: those that the format has by definition, else those found.
        images: Whether images are expected and looked at.
        made: Splits that are made, and examined instead of those by name.
    """

    format: DatasetFormat
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    images: bool = True
    made: Splits | None = None


@dataclass(frozen=True, eq=False)
class Examined:
    """One annotated image: what a training would find, and what it looks like, if it was decoded.

    `brightest` is, of an image of 16-bit values, the largest one as it is decoded, in 0..255.
    """

    member: Member
    record: ImageRecord
    print: Fingerprint | None = None
    brightest: int | None = None


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

    Raises:
        InputError: There is no dataset, or a split that is asked for does not exist.
    """
    format = options.format
    format.check_root()
    check_classes(options.class_names or ())
    table = read_split_table(format, options.splits) if options.made is None else table_of_made(options.made)
    named = [split.label for split in table.splits if split.members]
    known = options.class_names or format.known_classes(named if options.made is None else options.made.all_names)
    splits_of = table.by_image()
    found = _examine_images(options, known, table)
    first: dict[Image, Examined] = {}
    for one in found:
        first.setdefault(one.member.image, one)
    images = list(first.values())
    problems: list[Problem] = []
    for one in found:
        used = not table.splits or one.member.image in splits_of
        problems += one.record.problems if used else [replace(problem, used=False) for problem in one.record.problems]
    if options.images:
        for folder in format.empty_folders(one.member for one in images):
            # One line, not one for each image.
            problems = [
                problem
                for problem in problems
                if problem.kind != "missing_image" or not Path(problem.file).is_relative_to(folder)
            ]
            text = f"{folder}: holds no image, so none was looked at (--no_images examines the annotations alone)"
            problems.append(Problem(str(folder), None, "missing_image", text))
    problems += split_problems(table, {one.member.image: one.record.path or one.record.stated.file for one in images})
    problems += _copies(images, splits_of, format)
    problems += _dark_images(images, format)
    report = _report(images, table, known or ())
    problems += _class_problems(found, report, options, known or ())
    problems = list(dict.fromkeys(problems))
    order = {file: index for index, file in enumerate(sorted({problem.file for problem in problems}))}
    problems.sort(key=lambda problem: (order[problem.file], -1 if problem.object is None else problem.object))
    return replace(report, problems=problems)


def _examine_images(options: DoctorOptions, known: Sequence[str] | None, table: SplitTable) -> list[Examined]:
    """Read all annotations, each once, and decode all images, each once."""
    format = options.format
    members: dict[tuple[Image, Path | None], Member] = {}
    for member in (member for split in table.splits for member in split.members):
        members.setdefault((member.image, member.source if format.own_annotations else None), member)
    chosen = list(members.values())
    if not table.chosen:
        chosen = sorted([*chosen, *format.list_others(chosen, options.images)], key=lambda one: (one.folder, one.stem))
    records = format.read(chosen, known, options.images)
    files: dict[ImageFile, None] = {}
    for record in records:
        if record.path is not None and not any(problem.kind == "unreadable_image" for problem in record.problems):
            files[ImageFile(record.path, record.upright, format.reading)] = None
    decoded = dict(zip(files, map_files(_decode, list(files), "examining", parallel_from=PARALLEL_FROM), strict=True))
    found: list[Examined] = []
    for member, record in zip(chosen, records, strict=True):
        seen = decoded.get(ImageFile(record.path, record.upright, format.reading)) if record.path is not None else None
        if isinstance(seen, InputError):
            problem = Problem(str(record.path), None, "truncated_image", str(seen))
            found.append(Examined(member, replace(record, problems=[*record.problems, problem])))
        else:
            found.append(Examined(member, record, *(seen or ())))
    return found


def _decode(file: ImageFile) -> tuple[Fingerprint, int | None] | InputError:
    try:
        pixels = read_image(*file)
        return fingerprint(pixels), int(pixels.max()) if read_header(file.path).deep else None
    except InputError as error:
        return error


def _dark_images(found: Sequence[Examined], format: DatasetFormat) -> Iterator[Problem]:
    """Yield one problem for 16-bit values that use less than half of their range: those of fewer bits, most often."""
    levels = [one.brightest for one in found if one.brightest is not None]
    if not levels or max(levels) >= 128:
        return
    bit_depth = format.reading.bit_depth
    needed = bit_depth - 8 + max(levels).bit_length()
    likely = next(bits for bits in (8, 10, 12, 14, 16) if bits >= needed)
    text = (
        f"{format.root}: all values of its {len(levels)} images of 16 bits are below {2**needed}, less than half of "
        f"the range of {bit_depth} bits; --data.bit_depth {likely} makes use of it, if the camera has {likely} bits"
    )
    yield Problem(str(format.root), None, "dark_images", text)


def _copies(
    found: Sequence[Examined], splits_of: Mapping[Image, Sequence[UsedSplit]], format: DatasetFormat
) -> Iterator[Problem]:
    """Yield pictures with equal content: a leak if they are in splits that must not share images, else a duplicate.

    Of a leak the file of the training split is named, as the one to leave out.
    """

    def rank(index: int) -> int:
        parts = [PARTS.index(part) for split in splits_of.get(seen[index][0].member.image, []) for part in split.parts]
        return -max(parts, default=-1)

    seen = [(one, one.record.path, one.print) for one in found if one.record.path is not None and one.print is not None]
    files = [ImageFile(path, one.record.upright, format.reading) for one, path, _ in seen]
    for group in copies(files, [print_ for _, _, print_ in seen]):
        group.sort(key=rank)
        for position, index in enumerate(group[1:], start=1):
            one, path, _ = seen[index]
            others = [seen[other] for other in group[:position]]
            leaks = [
                (other, theirs.label, split.label)
                for earlier, other, _ in others
                for theirs in splits_of.get(earlier.member.image, [])
                for split in splits_of.get(one.member.image, [])
                if split.excludes(theirs)
            ]
            if leaks:
                other, theirs_label, label = leaks[0]
                text = f"{path}: shows what {other} shows; the one is in {label}, the other in {theirs_label}"
                yield Problem(str(path), None, "leak_by_content", text)
            else:
                yield Problem(str(path), None, "duplicate_image", f"{path}: shows what {others[0][1]} shows")


def _class_problems(
    found: Sequence[Examined], report: Report, options: DoctorOptions, known: Sequence[str]
) -> Iterator[Problem]:
    root = options.format.root
    for name in known:
        if not report.classes.get(name):
            yield Problem(str(root), None, "class_without_objects", f"{root}: no object of the class {name!r}")
    used = Counter(item.name for one in found for item in one.record.objects if item.box is not None)
    alike = similar_classes(used) if options.class_names is None else {}
    for one in found if alike else ():
        for item in one.record.objects:
            if item.name in alike:
                text = f"is of the class {item.name!r}, like {alike[item.name]!r}"
                yield one.record.stated.problem("similar_class", text, item, named=False)


def _report(found: Sequence[Examined], table: SplitTable, known: Sequence[str]) -> Report:
    classes, difficult, class_images = Counter[str](), Counter[str](), Counter[str]()
    objects = [(one.member, item) for one in found for item in one.record.objects]
    classes.update(item.name for _, item in objects if item.name)
    difficult.update(item.name for _, item in objects if item.name and item.difficult)
    class_images.update(name for _, name in {(member, item.name) for member, item in objects if item.name})
    names = [*known, *sorted(set(classes) - set(known))]
    boxes = [item.box for _, item in objects if item.box is not None]
    return Report(
        images=sum(one.record.stated.annotated for one in found),
        objects=len(objects),
        image_files=sum(one.record.path is not None for one in found),
        empty=sum(problem.kind == "empty_image" for one in found for problem in one.record.problems),
        classes={name: classes[name] for name in names},
        difficult={name: difficult[name] for name in names},
        class_images={name: class_images[name] for name in names},
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        splits={split.label: len(split.members) for split in table.splits},
        problems=[],
    )
