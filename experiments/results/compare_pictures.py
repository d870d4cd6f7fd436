"""Pictures of images with the detections of two runs side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.detection_dataset import Target
from detector.errors import InputError, printable
from detector.use.drawing import draw_detections, save_picture
from experiments.output import writing
from experiments.results.files import ImageFinder
from experiments.results.runs import Run
from experiments.results.scored_runs import data_module
from experiments.results.scores import Scored

SHORTEST_SIDE = 320
LONGEST_SIDE = 16_384
GAP = 8


def image_reader(run: Run, part: str) -> Callable[[str], tuple[Tensor, Target]]:
    """Return a function that reads an image (3, H, W) uint8 and its target by its name in the annotations.

    That raises InputError for an image that is not there or cannot be read.

    Raises:
        InputError: Anything wrong with the data that the run's config names.
    """
    data = data_module(run)
    dataset = data.val_dataset if part == "val" else data.test_dataset
    finder = ImageFinder([name.rsplit(".", 1)[0] for name in dataset.file_names])

    def read(name: str) -> tuple[Tensor, Target]:
        position = finder.find(name)
        if position is None:
            raise InputError("is not among the images of the split that can be used")
        return dataset[position]

    return read


def draw_images(
    runs: tuple[Run, Run],
    scored: tuple[Scored, Scored],
    part: str,
    images: Sequence[int],
    score_threshold: float,
    folder: str | Path,
) -> tuple[list[str | None], list[str]]:
    """Write one picture for each image: the first run's detections on the left, the second's on the right.

    Detections are coloured by class, ground truth is white and dashed.

    Args:
        runs: Their data say where the images are.
        scored: Their detections.
        part: val or test.
        images: Image ids.
        score_threshold: Detections below are not drawn.
        folder: Made if it is missing.

    Returns:
        Path of each picture, None of an image that cannot be drawn; and why that is so.

    Raises:
        InputError: No image is there, or the folder cannot be written.
    """
    read = image_reader(runs[0], part)
    paths: list[str | None] = []
    notes: list[str] = []
    for rank, image in enumerate(images, start=1):
        name = scored[0].truth.image_names[image]
        try:
            sides = [_draw(*read(name), one, image, score_threshold) for one in scored]
        except InputError as error:
            paths.append(None)
            notes.append(f"no picture of {printable(name)}: {printable(error)}")
            continue
        gap = torch.full((3, sides[0].shape[1], GAP), 255, dtype=torch.uint8)
        path = Path(folder) / f"{rank:02}_{name.rsplit('/', 1)[-1]}.jpg"
        with writing(f"--output {folder}"):
            save_picture(torch.cat([sides[0], gap, sides[1]], dim=2), path)
        paths.append(str(path))
    return paths, notes


def _draw(pixels: Tensor, target: Target, run: Scored, image: int, score_threshold: float) -> Tensor:
    found = run.detections
    rows = np.flatnonzero(found.image_id == image)
    rows = rows[np.argsort(-found.score[rows], kind="stable")]
    detections = {
        "boxes": torch.from_numpy(found.box[rows].astype(np.float32)),
        "labels": torch.from_numpy(found.label[rows]),
        "scores": torch.from_numpy(found.score[rows]),
    }
    return draw_detections(
        *(pixels, detections, run.truth.class_names, score_threshold, target["boxes"]),
        min_side=SHORTEST_SIDE,
        max_side=LONGEST_SIDE,
    )
