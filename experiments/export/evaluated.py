"""The detections of an exported file on the images of a split, for `frcnn evaluate`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datamodules.ground_truth import SplitTruth
from detector.errors import InputError, listed
from detector.metrics.voc_ap import Detections
from experiments.arguments import DataOptions
from experiments.dataset.data_format import DataFormat
from experiments.dataset.formats import data_module_of
from experiments.export.exported import ExportedDetector

_NAMED = ("root", "train_splits", "val_splits", "test_splits", "val_fraction", "split_seed", "bit_depth", "max_pixels")


def detect_split(path: str | Path, data_format: DataFormat, data: DataOptions, truth: SplitTruth) -> Detections:
    """Return what an exported file detects on the images that are validated on, one at a time.

    Args:
        path: The file, or the folder of an export.
        data_format: Format of the dataset.
        data: Names the splits.
        truth: Their objects.

    Raises:
        InputError: The file cannot be run, has other classes, or an image cannot be read.
    """
    detector = ExportedDetector(path)
    if sorted(detector.class_names) != sorted(truth.class_names):
        raise InputError(
            f"{detector.path}: detects {listed(detector.class_names)}, the data have {listed(truth.class_names)}; give "
            "data of the same classes"
        )
    given = {name: getattr(data, name) for name in _NAMED if getattr(data, name) is not None}
    if data.val_fraction is None:  # there is nothing to train on
        given |= {"train_splits": data.val_splits, "allow_overlap": True}
    given |= {"image_dirs": data.image_dirs} if data.image_dirs is not None else {}
    module = data_module_of(data_format)(
        **{"bit_depth": detector.about["bit_depth"], **given}, class_names=list(truth.class_names), num_workers=0
    )
    module.setup("validate")
    images = module.val_dataset
    labels = np.array([0, *(truth.class_names.index(name) + 1 for name in detector.class_names)])
    found = [detector([images[number][0]])[0] for number in range(len(images))]
    columns = {key: torch.cat([one[key] for one in found]).numpy() for key in ("boxes", "scores", "labels")}
    return Detections(
        image_id=_image_ids([len(one["scores"]) for one in found]),
        label=labels[columns["labels"]],
        score=columns["scores"].astype(np.float32),
        box=columns["boxes"],
    )


def _image_ids(counts: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)
