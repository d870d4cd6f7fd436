"""Pictures of the detections and missed objects behind the cells of a confusion matrix."""

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detector.errors import InputError, printable
from detector.metrics.curves import ConfusionMatrix, confusion_matrix
from detector.use.drawing import GROUND_TRUTH_COLOR, class_color, draw_boxes
from experiments.results.scores import Scored

MOST_OF_A_CELL: Final = 4
VIEW_WIDTH, MAX_SIDE = 240, 320
CONTEXT: Final = 0.4
"""How much of a box's longer side is shown around it."""


class CellPicture(NamedTuple):
    """A JPEG file's content, and the image that it is of."""

    jpeg: bytes
    image: str


def draw_cells(
    read: Callable[[str], tuple[Tensor, Any]], scored: Scored, curves: Mapping[str, Any], most: int
) -> dict[tuple[int, int], list[CellPicture]]:
    """Draw the best scored detections of each cell, and some of the missed objects.

    Objects are white and dashed; the detection or the object that is missed is coloured by its class.

    Args:
        read: Returns the pixels of an image, and anything.
        scored: The detections.
        curves: What `curves_of` tells of them.
        most: How many pictures: one of each cell, then a second, ...; mistakes first, and cells of large counts.

    Returns:
        By row and column, of cells that have pictures.
    """
    classes = len(scored.truth.class_names)
    matrix = confusion_matrix(scored.split, classes, curves["score_threshold"])

    def places(row: int, column: int) -> NDArray[np.int64]:
        if column == classes:
            return np.flatnonzero(matrix.missed & (scored.truth.objects.label == row + 1))
        found = np.flatnonzero((matrix.row == row) & (matrix.column == column))
        return found[np.argsort(-scored.detections.score[found], kind="stable")]

    cells = [(int(row), int(column)) for row, column in zip(*matrix.counts.nonzero(), strict=True)]
    cells.sort(key=lambda cell: (cell[0] == cell[1], -matrix.counts[cell]))
    wanted = [
        (rank, cell, place) for cell in cells for rank, place in enumerate(places(*cell)[:MOST_OF_A_CELL].tolist())
    ]
    found: dict[tuple[int, int], list[CellPicture]] = {}
    for _, cell, place in sorted(wanted, key=lambda one: one[0])[:most]:
        with contextlib.suppress(InputError):  # an image that is gone or damaged; others may be there
            picture = _draw(read, scored, matrix, place, missed=cell[1] == classes)
            found.setdefault(cell, []).append(picture)
    return found


def _draw(
    read: Callable[[str], tuple[Tensor, Any]], scored: Scored, matrix: ConfusionMatrix, place: int, missed: bool
) -> CellPicture:
    """Return a picture of a detection, or of a missed object, and what is around it."""
    objects, detections, names = scored.truth.objects, scored.detections, scored.truth.class_names
    columns = objects if missed else detections
    image = scored.truth.image_names[columns.image_id[place]]
    pixels = read(image)[0]
    shown = columns.box[[place]]
    if not missed and matrix.target[place] >= 0:
        shown = np.concatenate([shown, objects.box[[matrix.target[place]]]])
    low, high = shown[:, :2].min(axis=0), shown[:, 2:].max(axis=0)
    margin, size = CONTEXT * (high - low).max() + 8, np.array(pixels.shape[:0:-1])
    (x1, y1), (x2, y2) = np.clip([low - margin, high + margin], 0, size).round().astype(int).tolist()
    near = np.flatnonzero(objects.image_id == columns.image_id[place])
    near = near[near != place] if missed else near
    name = names[columns.label[place] - 1]
    captions = [names[objects.label[one] - 1] + " (difficult)" * bool(objects.difficult[one]) for one in near]
    captions.append(name if missed else f"{name} {detections.score[place]:.2f}")
    boxes = np.clip(np.concatenate([objects.box[near], columns.box[[place]]]), [x1, y1] * 2, [x2, y2] * 2)
    there = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1)).tolist()
    drawn = draw_boxes(
        pixels[:, y1:y2, x1:x2],
        torch.from_numpy(boxes[there] - [x1, y1] * 2),
        [printable(captions[one]) for one in there],
        [GROUND_TRUTH_COLOR if one < len(near) else class_color(name) for one in there],
        [one < len(near) for one in there],
        max_side=MAX_SIDE,
        view_width=VIEW_WIDTH,
    )
    file = io.BytesIO()
    Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75)
    return CellPicture(file.getvalue(), printable(image))
