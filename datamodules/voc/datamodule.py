"""VOCDataModule: which images and annotations, in PASCAL VOC format, and their download."""

from __future__ import annotations

from typing import Any

from datamodules.detection_datamodule import DetectionDataModule, collate
from datamodules.voc.download import Archive, archive_for, download_voc, find_archive, is_half_unpacked
from datamodules.voc.layout import find_split
from datamodules.voc.reader import VOCFormat
from detector import VOC_CLASSES
from detector.errors import InputError

__all__ = ["VOC_CLASSES", "VOCDataModule", "collate"]


class VOCDataModule(DetectionDataModule):
    """Images and boxes in PASCAL VOC format.

    Args:
        root: Folder that holds VOC<year>/ (or VOCdevkit/VOC<year>/), or itself a dataset folder with JPEGImages/,
            Annotations/ and ImageSets/Main/, with images/ and annotations/, or with images beside their XML files.
        train_splits: Splits to train on: "2007_trainval" where root holds VOC<year>/, else plain names such as "train":
            of a file in ImageSets/Main/, else of a folder of annotations.
        val_splits: Splits to validate on; with val_fraction none.
        test_splits: Splits to test on; never taken from the others.
        class_names: Class names in label order; default: the 20 VOC classes for VOC years, else the sorted names found
            in the annotations of all splits; with val_fraction and no train_splits in all annotations.
        download: Fetch missing VOC2007 or VOC2012 splits into root.
        options: Those of `DetectionDataModule`.

    Raises:
        InputError: for a missing root or bad values; `setup` raises it for anything wrong with the files.
    """

    format: VOCFormat

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
        format = VOCFormat(root)
        if not download:
            format.check_root()
        super().__init__(format, splits, class_names, **options)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing (one process per node), if asked to."""
        if not self.download:
            return
        wanted: list[Archive] = []
        for split in (find_split(self.format.root, name) for name in self.splits.all_names):
            there = split.path.exists()
            if not there and self.format.plain:
                raise InputError(f"{split.path}: no such split file, and only VOC years can be downloaded")
            archive = find_archive(split.folder.name.removeprefix("VOC"), split.name)
            if not there or (archive is not None and is_half_unpacked(self.format.root, archive)):
                wanted.append(archive_for(split.folder.name.removeprefix("VOC"), split.name))
        if wanted:
            download_voc(self.format.root, wanted)
