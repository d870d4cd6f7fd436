"""The ground truth of whole splits as flat arrays, for evaluation; images need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.checks import clip_box
from datamodules.file_cache import FileStore
from datamodules.image_reading import frame, read_header
from datamodules.voc.annotation_cache import AnnotationCache
from datamodules.voc.classes import no_classes
from datamodules.voc.format import Annotation, read_split
from datamodules.voc.layout import VOC_CLASSES, Split, annotated_members, check_root, find_image, find_split, is_plain
from detector.errors import InputError
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
    """

    splits: tuple[str, ...]
    image_names: tuple[str, ...]
    class_names: tuple[str, ...]
    objects: GroundTruth
    sizes: IntArray

    @property
    def image_ids(self) -> IntArray:
        """(N,) ids of all images, those without objects included."""
        return np.arange(len(self.image_names), dtype=np.int64)


def read_ground_truth(
    root: str | Path,
    splits: Sequence[str],
    class_names: Sequence[str] | None = None,
    option: str = "--data.val_splits",
) -> SplitTruth:
    """Read the annotations of splits as `VOCDataModule` would, in the same order and with the same boxes.

    An image's size, to which its boxes are clipped, is that of the image file, or where that is missing the one its
    annotation states.

    Args:
        root: As `--data.root`.
        splits: As `--data.val_splits`.
        class_names: In label order; default: the 20 VOC classes for VOC years, else the sorted names found in all
            annotations of the dataset folder.
        option: What names `splits` on the command line, for messages.

    Raises:
        InputError: A missing or bad file, an unknown class, an image name that is given twice; names the first such
            file and says how many more there are.
    """
    root = Path(root).expanduser()
    check_root(root)
    if not splits:
        raise InputError(f"{option} is empty; name at least one split")
    members = [
        (split, stem) for split in (find_split(root, name) for name in splits) for stem in read_split(split.path)
    ]
    names = tuple(stem for _, stem in members)
    _check_unique(names, splits, option)
    store = FileStore(AnnotationCache)
    if class_names is not None:
        classes = tuple(class_names)
    else:
        classes = _names_in(root, store, [split.path for split, _ in members]) if is_plain(root) else VOC_CLASSES
    if len(set(classes)) < len(classes):
        raise InputError(f"--data.class_names names a class twice: {', '.join(classes)}")
    objects, sizes = _objects_and_sizes(members, classes, store)
    return SplitTruth(tuple(splits), names, classes, objects, sizes)


def _check_unique(names: Sequence[str], splits: Sequence[str], option: str) -> None:
    first: dict[str, int] = {}
    repeated = [index for index, name in enumerate(names) if first.setdefault(name, index) != index]
    if repeated:
        raise InputError(
            f"{option} [{', '.join(splits)}]: image {repeated[0]} has the name {names[repeated[0]]}, which "
            f"image {first[names[repeated[0]]]} has too; {len(repeated)} names occur more than once, so results could "
            "not be told apart"
        )


def _objects_and_sizes(
    members: Sequence[tuple[Split, str]], classes: Sequence[str], store: FileStore[AnnotationCache]
) -> tuple[GroundTruth, IntArray]:
    """Read the objects of images, and their sizes (N, 2), height and width.

    Raises:
        InputError: As `read_ground_truth`, of the first bad file.
    """
    labels = {name: label for label, name in enumerate(classes, start=1)}
    rows: list[tuple[int, int, bool]] = []
    boxes: list[tuple[float, float, float, float]] = []
    sizes: list[tuple[int, int]] = []
    problems: list[InputError] = []
    found = _annotations(members, store)
    for image_id, (split, stem) in enumerate(members):
        path = split.annotation_path(stem)
        try:
            annotation = found[split.folder][stem]
            if isinstance(annotation, InputError):
                raise annotation
            size = _size(annotation, split, stem, path)
            sizes.append((size[1], size[0]))
            for index, item in enumerate(annotation.objects):
                if item.name not in labels:
                    raise InputError(
                        f"{path}: object {index} is of the class {item.name!r}; known classes (--data.class_names): "
                        f"{', '.join(classes)}"
                    )
                boxes.append(clip_box(item.box, size, f"{path}: object {index} ({item.name})"))
                rows.append((image_id, labels[item.name], item.difficult))
        except InputError as problem:
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 1} more files with problems)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}") from problems[0]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
    objects = GroundTruth(
        image_id=columns[:, 0],
        label=columns[:, 1],
        # float32, as the data module holds them, so that both give the same IoUs
        box=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        difficult=columns[:, 2].astype(np.bool_),
    )
    return objects, np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _annotations(
    members: Sequence[tuple[Split, str]], store: FileStore[AnnotationCache]
) -> dict[Path, dict[str, Annotation | InputError]]:
    stems: dict[Path, list[str]] = {}
    for split, stem in members:
        stems.setdefault(split.folder, []).append(stem)
    return {folder: store.of(folder).annotations(names) for folder, names in stems.items()}


def _names_in(folder: Path, store: FileStore[AnnotationCache], split_files: Sequence[Path]) -> tuple[str, ...]:
    annotations = store.of(folder).annotations([member.stem for member in annotated_members(folder)])
    # A bad file is left out: if it belongs to the splits it is reported when they are read.
    found = {
        item.name
        for annotation in annotations.values()
        if isinstance(annotation, Annotation)
        for item in annotation.objects
    }
    if not found:
        raise no_classes(folder, list(dict.fromkeys(split_files)), annotations)
    return tuple(sorted(found))


def _size(annotation: Annotation, split: Split, stem: str, path: Path) -> tuple[int, int]:
    stated = (annotation.width, annotation.height)
    try:
        image = find_image(split.folder, stem, annotation.file_name)
    except InputError:
        if min(stated) > 0:
            return stated
        raise InputError(f"{path}: states no image size, and the image is not there either") from None
    try:
        return frame(read_header(image), stated)[0]
    except InputError:  # only its size is wanted
        if min(stated) > 0:
            return stated
        raise
