"""VOCDataModule: which images and annotations, in PASCAL VOC format, and their download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.detection_datamodule import DetectionDataModule, collate
from datamodules.detection_dataset import ImageRecord
from datamodules.download import archive_for, download_voc
from datamodules.voc_dataset import read_splits
from datamodules.voc_format import Annotation, read_annotation, read_split
from datamodules.voc_splits import VOC_CLASSES, Split, check_overlap, check_root, find_split, is_plain
from detector.errors import InputError

__all__ = ["VOC_CLASSES", "VOCDataModule", "collate"]


class VOCDataModule(DetectionDataModule):
    """Images and boxes in PASCAL VOC format.

    Args:
        root: Folder that holds VOC<year>/ (or VOCdevkit/VOC<year>/), or itself a dataset folder with JPEGImages/,
            Annotations/ and ImageSets/Main/.
        train_splits: Splits to train on: "2007_trainval" where root holds VOC<year>/, else plain names such as "train".
        val_splits: Splits to validate on.
        test_splits: Splits to test on; never taken from the others.
        class_names: Class names in label order; default: the 20 VOC classes for VOC years, else the sorted names found
            in the annotations of all splits.
        download: Fetch missing VOC2007 or VOC2012 splits into root.
        options: Those of `DetectionDataModule`.

    Raises:
        InputError: for a missing root or bad values; `setup` raises it for anything wrong with the files.
    """

    def __init__(
        self,
        root: str,
        train_splits: list[str],
        val_splits: list[str],
        test_splits: list[str] | None = None,
        class_names: list[str] | None = None,
        download: bool = False,
        **options: Any,
    ) -> None:
        splits = {"train": train_splits, "val": val_splits, "test": test_splits or []}
        super().__init__(root, splits, **options)
        self.download = download
        self._plain = is_plain(self.root)
        if not download:
            check_root(self.root)
        self._annotations: dict[Path, Annotation] = {}
        self._set_class_names(class_names)

    def _all_splits(self) -> list[Split]:
        names = dict.fromkeys(name for names in self.split_names.values() for name in names)
        return [find_split(self.root, name) for name in names]

    def _find_class_names(self) -> list[str]:
        splits = self._all_splits()
        if not self._plain:
            return list(VOC_CLASSES)
        for split in splits:
            for stem in read_split(split.path):
                path = split.annotation_path(stem)
                if path not in self._annotations:
                    self._annotations[path] = read_annotation(path)
        found = {item.name for annotation in self._annotations.values() for item in annotation.objects}
        if not found:
            raise InputError(f"{self.root}: no annotation of the splits names an object, so there are no classes")
        return sorted(found)

    def prepare_data(self) -> None:
        """Download what is missing (one process per node), if asked to."""
        missing = [split for split in self._all_splits() if not split.path.is_file()] if self.download else []
        if not missing:
            return
        if self._plain:
            raise InputError(f"{missing[0].path}: no such split file, and only VOC years can be downloaded")
        download_voc(self.root, [archive_for(split.folder.name.removeprefix("VOC"), split.name) for split in missing])

    def _check_files(self, overlap: bool) -> None:
        check_root(self.root)
        if overlap:
            check_overlap({part: self._splits(part) for part in self.split_names})

    def _splits(self, part: str) -> list[Split]:
        return [find_split(self.root, name) for name in self.split_names[part]]

    def _read_part(self, part: str) -> tuple[list[ImageRecord], list[InputError]]:
        return read_splits(self._splits(part), self.class_names, self._annotations)

    def _forget(self) -> None:
        self._annotations = {}
