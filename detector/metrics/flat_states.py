"""The common parts of the metrics that run in validation: states that gather safely, images that count once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from detector.errors import InputError
from detector.kernels.transfers import send
from detector.metrics.voc_ap import IntArray


class FlatStateMetric(Metric):
    """A metric whose states are all lists of one-dimensional tensors of a fixed type, concatenated over processes.

    torchmetrics gathers a list state that is empty on one process as an empty float32 tensor of one dimension. Beside
    int64 tensors, or tensors of two dimensions, on the other processes, the messages then differ in size: gloo aborts,
    NCCL may hang. Here each state is made one tensor of its own type before it is gathered, so that processes with few
    images, or none, exchange the same messages as the others. `ints` and `floats` name the states of type int64 and
    float32.

    Attributes:
        only: Those of `class_names` that the numbers are of, in the same order; all by default.
    """

    full_state_update = False

    def __init__(self, class_names: Sequence[str], ints: Sequence[str], floats: Sequence[str]) -> None:
        super().__init__()
        self.class_names = self.only = tuple(class_names)
        self._evaluated: Any = None
        self._state_types = dict.fromkeys(ints, torch.int64) | dict.fromkeys(floats, torch.float32)
        for name in self._state_types:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def append(self, **values: Tensor) -> None:
        """Append values to the states of these names, flattened, cast, and on the metric's device."""
        self._evaluated = None
        for name, value in values.items():
            getattr(self, name).append(send(value.detach(), self.device).to(self._state_types[name]).flatten())

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self._evaluated = None

    def last_evaluated(self) -> Any:
        """Return what the last `compute` kept.

        Raises:
            RuntimeError: Nothing was computed since the last `update` or `reset`.
        """
        if self._evaluated is None:
            raise RuntimeError("call compute() first: what was seen is gathered from all processes there")
        return self._evaluated

    def array(self, name: str) -> NDArray[Any]:
        """Return a state as one array (n,) of its type; inside `compute` that of all processes, by rank."""
        array: NDArray[Any] = self._concatenated(name).cpu().numpy()
        return array

    def tensors(self, values: dict[str, float]) -> dict[str, Tensor]:
        """Return numbers as `compute` gives them: 0-d float32 tensors on the metric's device."""
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in values.items()}

    def _concatenated(self, name: str) -> Tensor:
        state = getattr(self, name)
        parts = [state] if isinstance(state, Tensor) else state
        empty = torch.empty(0, dtype=self._state_types[name], device=self.device)
        return torch.cat([empty, *(part.to(self.device) for part in parts)])

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors, process_group: object | None = None
    ) -> None:
        for name in self._state_types:
            setattr(self, name, [self._concatenated(name)])
        super()._sync_dist(dist_sync_fn, process_group)


def image_ids_of(targets: list[dict[str, Tensor]]) -> Tensor:
    """Return the image ids of a batch, (B,) int64 on the CPU; a GPU is waited for once."""
    return torch.stack([torch.as_tensor(target["image_id"]) for target in targets]).to("cpu", torch.int64)


def first_of_each_image(image_id: IntArray) -> IntArray:
    """Return the positions (N,) at which each of N images occurs first, by ascending image id.

    Samplers repeat images to give all processes equally many; the repeats are dropped here.
    """
    first: IntArray = np.unique(image_id, return_index=True)[1]
    return first


def rows_of(chosen: IntArray, counts: IntArray) -> IntArray:
    """Return the rows of the chosen images, where image i owns `counts[i]` consecutive rows of a flat array."""
    first = np.cumsum(counts) - counts
    number = counts[chosen]
    before = np.cumsum(number) - number
    rows: IntArray = np.arange(number.sum()) + np.repeat(first[chosen] - before, number)
    return rows


def check_batch(what: str, items: list[dict[str, Tensor]] | list[Tensor], targets: list[dict[str, Tensor]]) -> None:
    """Raise InputError if a batch does not hold one entry per target."""
    if len(items) != len(targets):
        raise InputError(f"{what} of {len(items)} images for {len(targets)} targets; there must be one entry per image")


def check_boxes(what: str, boxes: Tensor, counts: list[int], image_ids: Tensor, scores: Tensor | None = None) -> None:
    """Check boxes (n, 4) and scores (n,) of a batch, at the price of one synchronisation.

    Raises:
        InputError: Names the image and the index within it of the first bad entry.
    """
    finite = torch.isfinite(boxes).all(dim=1)
    if scores is not None:
        finite = finite & torch.isfinite(scores)
    bad = ~finite | (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    if not bool(bad.any()):
        return
    row, place = _locate(bad, counts, image_ids)
    score = "" if scores is None else f", score {float(scores[row])}"
    raise InputError(
        f"{what} {place}: box {boxes[row].tolist()}{score} ({int(bad.sum())} bad in this batch); "
        "values must be finite and boxes x1 <= x2, y1 <= y2"
    )


def check_labels(what: str, labels: Tensor, counts: list[int], image_ids: Tensor, num_classes: int) -> None:
    """Raise InputError if one of the labels (n,) of a batch is not in 1..num_classes."""
    bad = (labels < 1) | (labels > num_classes)
    if bool(bad.any()):
        row, place = _locate(bad, counts, image_ids)
        raise InputError(f"{what} {place}: label {int(labels[row])}; labels must be in 1..{num_classes}")


def _locate(bad: Tensor, counts: list[int], image_ids: Tensor) -> tuple[int, str]:
    """Return the first bad row of a concatenated batch, and its index and image in words."""
    row, ends = int(bad.to(torch.int64).argmax()), np.cumsum(counts)
    position = int(np.searchsorted(ends, row, side="right"))
    return row, f"{row - int(ends[position]) + counts[position]} of image {int(image_ids[position])}"
