"""The detections of a trained or exported detector on the images of a split, for `frcnn evaluate`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import detector
from datamodules.detection_datamodule import DetectionDataModule
from datamodules.ground_truth import SplitTruth
from detector.errors import InputError, listed
from detector.files import ABOUT, program_of
from detector.metrics.voc_ap import Detections
from detector.training.progress_line import watched
from experiments.arguments import DataOptions
from experiments.dataset.data_format import DataFormat
from experiments.dataset.formats import data_module_of

_NAMED = ("root", "train_splits", "val_splits", "test_splits", "val_fraction", "split_seed", "bit_depth", "max_pixels")


def is_detector(path: str | Path) -> bool:
    """Return whether a path is that of a checkpoint, a run or an export, and not of results."""
    path = Path(path)
    inside = any((path / name).is_file() for name in (ABOUT, "checkpoints/last.ckpt"))
    return inside or program_of(path) is not None or path.suffix in (".ckpt", ".safetensors")


def detect_split(path: str | Path, data_format: DataFormat, data: DataOptions, truth: SplitTruth) -> Detections:
    """Return what a detector finds in the images that are validated on, one at a time, in float32.

    Args:
        path: Whatever `detector.load` takes.
        data_format: Format of the dataset.
        data: Names the splits.
        truth: Their objects.

    Raises:
        InputError: The file cannot be run, has other classes, or an image cannot be read.
    """
    trained = detector.load(path, bit_depth=data.bit_depth)
    names = list(trained.class_names.values())
    if sorted(names) != sorted(truth.class_names):
        raise InputError(
            f"{path}: detects {listed(names)}, the data have {listed(truth.class_names)}; give data of the same classes"
        )
    module = data_module(data_format, data, truth.class_names, trained.reading.bit_depth)
    module.setup("validate")
    images = module.val_dataset
    labels = np.array([0, *(truth.class_names.index(name) + 1 for name in names)])
    numbers = watched(iter(range(len(images))), len(images), "evaluation", "images")
    found = [trained.detect([images[number][0]])[0] for number in numbers]
    columns = {key: torch.cat([one[key] for one in found]).numpy() for key in ("boxes", "scores", "labels")}
    return Detections(
        image_id=_image_ids([len(one["scores"]) for one in found]),
        label=labels[columns["labels"]],
        score=columns["scores"].astype(np.float32),
        box=columns["boxes"],
    )


def data_module(
    data_format: DataFormat, data: DataOptions, class_names: Sequence[str], bit_depth: int
) -> DetectionDataModule:
    """Return the data module of splits, of which there may be none to train on."""
    given = {name: getattr(data, name) for name in _NAMED if getattr(data, name) is not None}
    if data.val_fraction is None:
        given |= {"train_splits": data.train_splits or data.val_splits, "allow_overlap": True}
    given |= {"image_dirs": data.image_dirs} if data.image_dirs is not None else {}
    options = {"bit_depth": bit_depth, **given, "class_names": list(class_names), "num_workers": 0}
    made: DetectionDataModule = data_module_of(data_format)(**options)
    return made


def _image_ids(counts: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)
