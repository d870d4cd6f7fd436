"""Curves of a run, from its TensorBoard event files."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from detector.training.event_files import quick_checksums


@dataclass(frozen=True)
class Curve:
    """Hold a logged scalar, one value at least; of a step that was repeated after an interruption the last one."""

    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    values: tuple[float, ...]


def read_curves(folder: Path, tags: Iterable[str]) -> dict[str, Curve]:
    """Return the curves of a run folder, by tag; those that were never logged are left out.

    Epochs count from 1, as passes over the data that are finished. A file that is still being written is read as far
    as it goes.
    """
    if not any(folder.glob("events.out.*")):
        return {}
    # Here, because it takes a second to import.
    from tensorboard.backend.event_processing import event_accumulator as tensorboard  # type: ignore[import-untyped]

    quick_checksums()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    guidance = {tensorboard.SCALARS: 0, tensorboard.IMAGES: 1, tensorboard.TENSORS: 1, tensorboard.HISTOGRAMS: 1}
    events = tensorboard.EventAccumulator(str(folder), size_guidance=guidance)
    try:
        events.Reload()
    except Exception:  # whatever a damaged file makes of it: a report shows the numbers that there are
        return {}
    there = set(events.Tags()["scalars"])

    def scalars(tag: str) -> dict[int, float]:
        rows = events.Scalars(tag) if tag in there else []  # as they were written, because clocks jump
        return dict(sorted({event.step: float(event.value) for event in rows}.items()))

    epochs = scalars("epoch") | scalars("weights/epoch")  # of older runs, and of newer ones
    curves = {}
    for tag in tags:
        points = scalars(tag)
        if points:
            at = tuple(epochs.get(step, float("nan")) + 1 for step in points)
            curves[tag] = Curve(tuple(points), at, tuple(points.values()))
    return curves
