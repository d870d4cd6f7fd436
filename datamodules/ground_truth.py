"""Records of images -> flat arrays: the ground truth of training, validation, `frcnn evaluate` and `frcnn anchors`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from datamodules.checks import check_classes
from datamodules.dataset_format import DatasetFormat, Id, ImageRecord, Member
from datamodules.problems import Problem
from datamodules.splits import Splits
from detector.errors import InputError, listed
from detector.metrics.voc_ap import GroundTruth, IntArray


@dataclass(frozen=True, eq=False)
class SplitTruth:
    """The objects of one or several splits.

    Attributes:
        splits: The splits, as named on the command line.
        image_names: Names of the images without suffix, in split order; the image id is the position.
        class_names: Of labels 1..C.
        objects: All objects, those marked difficult included; boxes are clipped to their image.
        sizes: (N, 2) height and width of the images in pixels.
        result_ids: What results call the images, where the files say it, beside their names.
        category_ids: What results call the classes, where the files say it, beside their names.
    """

    splits: tuple[str, ...]
    image_names: tuple[str, ...]
    class_names: tuple[str, ...]
    objects: GroundTruth
    sizes: IntArray
    result_ids: tuple[Id, ...] | None = None
    category_ids: tuple[Id, ...] | None = None

    @property
    def image_ids(self) -> IntArray:
        """Return the ids (N,) of all images, those without objects included."""
        return np.arange(len(self.image_names), dtype=np.int64)


def objects_of(records: Sequence[ImageRecord], class_names: Sequence[str]) -> GroundTruth:
    """Return the usable objects of images, in order, with positions as image ids and labels 1..C."""
    labels = {name: label for label, name in enumerate(class_names, start=1)}
    found = [(number, item) for number, record in enumerate(records) for item in record.objects if item.box is not None]
    return GroundTruth(
        image_id=np.array([number for number, _ in found], dtype=np.int64),
        label=np.array([labels[item.name] for _, item in found], dtype=np.int64),
        box=np.array([item.box for _, item in found], dtype=np.float32).reshape(-1, 4),
        difficult=np.array([item.difficult for _, item in found], dtype=np.bool_),
    )


def read_ground_truth(
    format: DatasetFormat,
    splits: Sequence[str],
    class_names: Sequence[str] | None = None,
    option: str = "--data.val_splits",
) -> SplitTruth:
    """Read the annotations of splits in the same order and with the same boxes as a training does.

    Classes are by default those that the format has by definition or states, else the sorted names found in all
    annotations of the dataset, so that numbers do not depend on the split. Messages say that `option` names the splits.

    Raises:
        InputError: A missing or bad file, an unknown class, an image name that is given twice; names the first such
            file and says how many more there are.
    """
    format.check_root()
    if not splits:
        offered = listed(format.offered() or [])
        there = f" (there are {offered})" if offered else ""
        raise InputError(f"{option} is empty; name at least one split{there}, or have some made by --data.val_fraction")
    members = format.list_images(splits)
    classes = list(class_names or format.class_names(splits, everything=True))
    return truth_of(format, splits, members, classes, f"{option} [{', '.join(splits)}]")


def read_part(splits: Splits, part: str, class_names: Sequence[str] | None = None, skip: bool = False) -> SplitTruth:
    """Read the annotations of "train", "val" or "test", made or named, as `truth_of` does.

    Raises:
        InputError: As `read_ground_truth`, or there is no such part.
    """
    format = splits.format
    format.check_root()
    splits.check_given(part)
    names, sources = splits.names[part] or [part], splits.sources(part)
    classes = list(class_names or format.class_names(sources, everything=True))
    where = f"--data.{part}_splits [{', '.join(names)}]"
    return replace(truth_of(format, sources, splits.members(part), classes, where, skip), splits=tuple(names))


def truth_of(
    format: DatasetFormat,
    splits: Sequence[str],
    members: Sequence[Member],
    class_names: Sequence[str],
    where: str,
    skip: bool = False,
) -> SplitTruth:
    """Read the annotations of images, which need not be there.

    An image's size, to which its boxes are clipped, is that of the image file, or where that is missing the one its
    annotation states. Messages begin with `where`. With `skip`, what cannot be used is left out, as a training under
    `--data.on_error skip` does.

    Raises:
        InputError: As `read_ground_truth`.
    """
    check_classes(class_names)
    records = format.read(members, class_names)
    if skip and any(record.usable for record in records):  # else the images are elsewhere, and nothing is known of them
        usable = [number for number, record in enumerate(records) if record.usable]
        members, records = [members[number] for number in usable], [records[number] for number in usable]
    else:
        _check(records)
    names = format.image_names(members)
    first: dict[str, int] = {}
    repeated = [index for index, name in enumerate(names) if first.setdefault(name, index) != index]
    if repeated:
        raise InputError(
            f"{where}: image {repeated[0]} has the name {names[repeated[0]]}, which image {first[names[repeated[0]]]} "
            f"has too; {len(repeated)} names occur more than once, so results could not be told apart"
        )
    ids = format.category_ids(splits, class_names)
    return SplitTruth(
        tuple(splits),
        names,
        tuple(class_names),
        objects_of(records, class_names),
        np.array([record.size[::-1] for record in records], dtype=np.int64).reshape(-1, 2),
        None if ids is None else tuple(record.stated.result_id or 0 for record in records),
        None if ids is None else tuple(ids),
    )


def _check(records: Sequence[ImageRecord]) -> None:
    """Raise InputError for what is wrong with annotations, and for sizes that neither they nor the images state."""
    problems: list[Problem] = []
    for record in records:
        no_size = min(record.size) <= 0
        for problem in record.problems:
            if problem.kind == "unknown_size":
                problems.append(replace(problem, message=f"{problem.message}, and the image is not there either"))
            elif problem.breaks and problem.kind != "missing_image" and (no_size or problem.kind != "unreadable_image"):
                problems.append(problem)
    if problems:
        files = len({problem.file for problem in problems})
        more = f" (and {files - 1} more files with problems)" if files > 1 else ""
        raise InputError(f"{problems[0].message}{more}")
