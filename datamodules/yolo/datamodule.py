"""YoloDataModule: which images and labels, in YOLO's text format."""

from __future__ import annotations

from typing import Any

from datamodules.detection_datamodule import DetectionDataModule
from datamodules.yolo.reader import YoloFormat


class YoloDataModule(DetectionDataModule):
    """Images and boxes in YOLO's text format: lines of class, centre and sides, or of the corners of a polygon.

    An image without a label file has no objects. No object is difficult: the format has no word for it.

    Args:
        root: Dataset folder with images/train and labels/train, or train/images and train/labels, or images and labels
            in one folder, and with data.yaml or classes.txt; or the data.yaml itself.
        train_splits: Splits to train on: those of data.yaml (train, val, test), else folders of these names or lists of
            images such as train.txt.
        val_splits: Splits to validate on; with val_fraction none.
        test_splits: Splits to test on; never taken from the others.
        class_names: Class names in label order; default: those of data.yaml or classes.txt by their numbers.
        options: Those of `DetectionDataModule`.

    Raises:
        InputError: for a missing root or bad values; `setup` raises it for anything wrong with the files.
    """

    def __init__(
        self,
        root: str,
        train_splits: list[str] | None = None,
        val_splits: list[str] | None = None,
        test_splits: list[str] | None = None,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        splits = {"train": train_splits or [], "val": val_splits or [], "test": test_splits or []}
        format = YoloFormat(root)
        format.check_root()
        super().__init__(format, splits, class_names, **options)
