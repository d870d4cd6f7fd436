"""YoloDataModule: which images and labels, in YOLO's text format."""

from __future__ import annotations

from datamodules.detection_datamodule import FormatDataModule
from datamodules.yolo.reader import YoloFormat


class YoloDataModule(FormatDataModule):
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

    reader = YoloFormat
