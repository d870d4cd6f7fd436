"""CocoDataModule: which images and annotations, in COCO's JSON format."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from pytorch_lightning.utilities import rank_zero_only

from datamodules.checks import Box, check_box, unknown_class
from datamodules.coco.format import CocoFile, CocoImage, CocoObject, id_order, read_coco
from datamodules.coco.values import Id
from datamodules.detection_datamodule import DetectionDataModule
from datamodules.detection_dataset import ImageRecord
from datamodules.image_reading import ImageHeader, frame
from datamodules.problems import Problem
from datamodules.splits import Member
from detector.errors import InputError, listed

PLACES: Final = ("annotations/{}.json", "annotations/instances_{}.json", "{}.json", "{}/_annotations.coco.json")


class CocoDataModule(DetectionDataModule):
    """Images and boxes in COCO's JSON format. A region marked `iscrowd` is read as a difficult object.

    Args:
        root: Folder that the other paths are relative to.
        train_splits: Annotation files to train on: a path such as annotations/instances_train2017.json, or a short name
            such as train2017, which is looked for as annotations/train2017.json, annotations/instances_train2017.json,
            train2017.json and train2017/_annotations.coco.json.
        val_splits: Annotation files to validate on; with val_fraction none.
        test_splits: Annotation files to test on; never taken from the others.
        image_dirs: Folders that the file names of images are relative to, tried one after the other; default: the
            annotation file's own, the one of the split's name (train2017 for instances_train2017.json), images/ and
            root.
        class_names: Class names in label order; default: the categories by ascending id, without one that only names
            the supercategory of the others and has no objects.
        options: Those of `DetectionDataModule`.

    Raises:
        InputError: for missing or bad annotation files and bad values; `setup` raises it for anything wrong with the
            images.
    """

    def __init__(
        self,
        root: str,
        train_splits: list[str] | None = None,
        val_splits: list[str] | None = None,
        test_splits: list[str] | None = None,
        image_dirs: list[str] | None = None,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        splits = {"train": train_splits or [], "val": val_splits or [], "test": test_splits or []}
        super().__init__(root, splits, **options)
        self.image_dirs = image_dirs
        self._files: dict[Path, CocoFile] = {}
        self._said: set[str] = set()
        self._check_root()
        if self.val_fraction is not None and not self.split_names["train"]:
            raise InputError(
                "--data.val_fraction divides the images of --data.train_splits, which is empty; name at least one file"
            )
        self._set_class_names(class_names)

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise InputError(f"--data.root {self.root}: no such folder")

    def _find_class_names(self) -> list[str]:
        names = dict.fromkeys(name for splits in self.split_names.values() for name in splits)
        files = [self._file(path) for path in map(self._find_file, names)]
        used = {(category.id, category.name) for file in files for category in file.categories}
        found: dict[str, None] = {}
        for file in files:
            root = [] if file.root is None or (file.root.id, file.root.name) not in used else [file.root]
            if file.root is not None and not root:
                self._say(
                    f"{file.path}: the category {file.root.name!r} (id {file.root.id}) is left out: it only names the "
                    "supercategory of the others, and has no objects"
                )
            found |= dict.fromkeys(category.name for category in sorted([*file.categories, *root], key=id_order))
        if not found:
            raise InputError(f"{files[0].path}: names no categories, so there are no classes")
        return list(found)

    def _say(self, line: str) -> None:
        """Once, by one process."""
        if line not in self._said:
            self._said.add(line)
            rank_zero_only(print)(line, file=sys.stderr)

    def _find_file(self, name: str) -> Path:
        candidates = [self.root / name, *(self.root / place.format(name) for place in PLACES)]
        for path in candidates:
            if path.is_file():
                return path
        files = [*self.root.glob("*.json"), *self.root.glob("*/*.json")]
        present = sorted(path.relative_to(self.root).as_posix() for path in files)
        there = listed(present) or "no JSON file"
        raise InputError(f"{self.root / name}: no such annotation file; {self.root} holds {there}")

    def _file(self, path: Path) -> CocoFile:
        if path not in self._files:
            self._files[path] = read_coco(path)
            for note in self._files[path].notes:
                self._say(note)
        return self._files[path]

    def _list_images(self, part: str, missing_ok: bool = False) -> list[Member]:
        paths = []
        for name in self.split_names[part]:
            try:
                paths.append(self._find_file(name))
            except InputError:
                if not missing_ok:
                    raise
        members: list[Member] = []
        for path in paths:
            prefix = (
                f"{_split_name(path)}/" if len(paths) > 1 else ""
            )  # two files may hold equal names of different images
            folders = self._image_folders(path)
            for name in self._file(path).images:
                # Nearly always the folder of the image before.
                folder = next((folder for folder in folders if (folder / name).is_file()), folders[0])
                folders.insert(0, folders.pop(folders.index(folder)))
                members.append(Member(prefix + name, folder, name, path))
        return members

    def _image_folders(self, path: Path) -> list[Path]:
        if self.image_dirs is not None:
            if not self.image_dirs:
                raise InputError("--data.image_dirs is empty; name at least one folder, or leave the option out")
            return [self.root / folder for folder in self.image_dirs]
        split = _split_name(path)
        return [path.parent, self.root / split, self.root / "images" / split, self.root / "images", self.root]

    def _list_annotated(self) -> list[Member]:
        return []

    def _read_members(self, members: Sequence[Member]) -> tuple[list[ImageRecord], list[Problem]]:
        headers = self._store.of(self.root).headers(member.folder / member.stem for member in members)
        labels = {name: index + 1 for index, name in enumerate(self.class_names)}
        records: list[ImageRecord] = []
        problems: list[Problem] = []
        seen: set[Path] = set()
        for source, group in groupby(members, key=lambda member: member.source):
            file = self._file(source)
            for member in group:
                image = file.images[member.stem]
                if member.stem in file.unusable:
                    problems += image.problems
                    continue
                path = member.folder / member.stem
                if path in seen:
                    text = f"{source}: names {path}, which another of the splits names too"
                    problems.append(Problem(str(source), None, "named_twice", text))
                    continue
                record, found = _record(member, image, headers[path], labels)
                problems += found
                if record is not None:
                    seen.add(path)
                    records.append(record)
        return records, problems

    def _category_ids(self, part: str) -> list[Id] | None:
        made = part == "val" and self.val_fraction is not None
        files = [self._file(self._find_file(name)) for name in self.split_names["train" if made else part]]
        ids: dict[str, Id] = {}
        for file in files:
            root = () if file.root is None else (file.root,)
            for category in (*file.categories, *root):
                ids.setdefault(category.name, category.id)
        images = [image.id for file in files for image in file.images.values()]
        contradict = any(ids[category.name] != category.id for file in files for category in file.categories)
        if len(files) > 1 and (contradict or len(set(images)) < len(images)):
            self._say(
                f"the files of the {part} splits give one id to different images, or one category different ids: "
                "predictions.json numbers images and classes by itself"
            )
            return None
        free = count(1 + max((number for number in ids.values() if isinstance(number, int)), default=0))
        return [ids[name] if name in ids else next(free) for name in self.class_names]

    def _forget(self) -> None:
        super()._forget()
        self._files = {}


def _split_name(path: Path) -> str:
    return path.parent.name if path.name == "_annotations.coco.json" else path.stem.removeprefix("instances_")


def _record(
    member: Member, image: CocoImage, header: ImageHeader | InputError, labels: Mapping[str, int]
) -> tuple[ImageRecord | None, list[Problem]]:
    """The image as it is used, without the objects that cannot be, or None; and what is wrong with it."""
    path = member.folder / member.stem
    if isinstance(header, InputError):
        if path.is_file():
            return None, [*image.problems, Problem(str(path), None, "unreadable_image", str(header))]
        text = f"{path}: no such image, but {member.source} names it (--data.image_dirs)"
        return None, [*image.problems, Problem(str(path), None, "missing_image", text)]
    size, upright = frame(header, (image.width, image.height))
    problems = list(image.problems)
    kept: list[tuple[Box, CocoObject]] = []
    for item in image.objects:
        where = f"{member.source}: annotations[{item.index}] ({item.category}, {member.stem})"
        box, found = check_box(item.box, size, where)
        if item.category not in labels:
            kind, text = unknown_class(item.category, list(labels))
            found.insert(0, (kind, f"{where} is of a category that is no known class{text}"))
        elif box is not None:
            kept.append((box, item))
        problems += [Problem(str(member.source), item.index, kind, message) for kind, message in found]
    problems.sort(key=lambda problem: -1 if problem.object is None else problem.object)
    record = ImageRecord(
        path=path,
        name=member.stem,
        boxes=np.array([box for box, _ in kept], dtype=np.float32).reshape(-1, 4),
        labels=np.array([labels[item.category] for _, item in kept], dtype=np.int64),
        difficult=np.array([item.crowd for _, item in kept], dtype=np.bool_),
        upright=upright,
        size=size,
        result_id=image.id,
    )
    return record, problems
