"""CocoDataModule: which images and annotations, in COCO's JSON format."""

from __future__ import annotations

from typing import Any

from datamodules.coco.reader import CocoFormat
from datamodules.detection_datamodule import DetectionDataModule


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
        format = CocoFormat(root, image_dirs=image_dirs)
        format.check_root()
        super().__init__(format, splits, class_names, **options)
