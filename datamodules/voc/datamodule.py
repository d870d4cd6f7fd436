"""VOCDataModule: which images and annotations, in PASCAL VOC format, and their download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from datamodules.detection_datamodule import DetectionDataModule, collate
from datamodules.detection_dataset import ImageRecord
from datamodules.file_cache import FileCache, FileStore
from datamodules.problems import Problem
from datamodules.splits import Member
from datamodules.voc.annotation_cache import AnnotationCache
from datamodules.voc.classes import no_classes
from datamodules.voc.download import Archive, archive_for, download_voc, find_archive, is_half_unpacked
from datamodules.voc.layout import VOC_CLASSES, Split, annotated_members, check_root, find_split, is_plain, members_of
from datamodules.voc.reader import read_members, readable_objects
from detector.errors import InputError

__all__ = ["VOC_CLASSES", "VOCDataModule", "collate"]


class VOCDataModule(DetectionDataModule):
    """Images and boxes in PASCAL VOC format.

    Args:
        root: Folder that holds VOC<year>/ (or VOCdevkit/VOC<year>/), or itself a dataset folder with JPEGImages/,
            Annotations/ and ImageSets/Main/.
        train_splits: Splits to train on: "2007_trainval" where root holds VOC<year>/, else plain names such as "train".
        val_splits: Splits to validate on; with val_fraction none.
        test_splits: Splits to test on; never taken from the others.
        class_names: Class names in label order; default: the 20 VOC classes for VOC years, else the sorted names found
            in the annotations of all splits; with val_fraction and no train_splits in all annotations.
        download: Fetch missing VOC2007 or VOC2012 splits into root.
        options: Those of `DetectionDataModule`.

    Raises:
        InputError: for a missing root or bad values; `setup` raises it for anything wrong with the files.
    """

    cache_kind: ClassVar[type[FileCache]] = AnnotationCache
    _store: FileStore[AnnotationCache]

    def __init__(
        self,
        root: str,
        train_splits: list[str] | None = None,
        val_splits: list[str] | None = None,
        test_splits: list[str] | None = None,
        class_names: list[str] | None = None,
        download: bool = False,
        **options: Any,
    ) -> None:
        splits = {"train": train_splits or [], "val": val_splits or [], "test": test_splits or []}
        super().__init__(root, splits, **options)
        self.download = download
        self._plain = is_plain(self.root)
        if not download:
            check_root(self.root)
        if not self._plain and self.val_fraction is not None and not self.split_names["train"]:
            raise InputError(
                "--data.val_fraction divides the images of --data.train_splits, which is empty; name at least one "
                "split, such as 2007_trainval"
            )
        self._set_class_names(class_names)

    def _find_class_names(self) -> list[str]:
        splits = self._all_splits()
        if not self._plain:
            return list(VOC_CLASSES)
        stems = {member.stem for split in splits for member in members_of(split, plain=True)}
        if not self.split_names["train"]:
            stems |= {member.stem for member in annotated_members(self.root)}
        found: set[str] = set()
        annotations = self._store.of(self.root).annotations(sorted(stems))
        for stem, annotation in annotations.items():
            found |= {item.name for item in readable_objects(self.root, stem, annotation)}
        if not found:
            raise no_classes(self.root, [split.path for split in splits], annotations)
        return sorted(found)

    def _all_splits(self) -> list[Split]:
        names = dict.fromkeys(name for names in self.split_names.values() for name in names)
        return [find_split(self.root, name) for name in names]

    def prepare_data(self) -> None:
        """Download what is missing (one process per node), if asked to."""
        if not self.download:
            return
        wanted: list[Archive] = []
        for split in self._all_splits():
            there = split.path.is_file()
            if not there and self._plain:
                raise InputError(f"{split.path}: no such split file, and only VOC years can be downloaded")
            archive = find_archive(split.folder.name.removeprefix("VOC"), split.name)
            if not there or (archive is not None and is_half_unpacked(self.root, archive)):
                wanted.append(archive_for(split.folder.name.removeprefix("VOC"), split.name))
        if wanted:
            download_voc(self.root, wanted)

    def _check_root(self) -> None:
        check_root(self.root)

    def _list_images(self, part: str, missing_ok: bool = False) -> list[Member]:
        splits = [find_split(self.root, name) for name in self.split_names[part]]
        there = [split for split in splits if split.path.is_file() or not missing_ok]
        return [member for split in there for member in members_of(split, self._plain)]

    def _list_annotated(self) -> list[Member]:
        return annotated_members(self.root)

    def _read_members(self, members: Sequence[Member]) -> tuple[list[ImageRecord], list[Problem]]:
        return read_members(members, self.class_names, self._store)
