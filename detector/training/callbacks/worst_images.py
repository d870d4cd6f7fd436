"""The images of a validation that cost most average precision, in pictures that say why."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import printable
from detector.metrics.error_breakdown import KINDS, ErrorBreakdown, break_down_errors, costs_of_mistakes
from detector.metrics.voc_ap import TRUE_POSITIVE, Detections, IntArray, evaluate_voc
from detector.training.callbacks.mistakes import LOOKS, draw_mistakes
from detector.training.callbacks.validation_pictures import ValidationPictures, validation_data
from detector.training.lightning_module import FasterRCNNModule

_MISTAKES: Final = 8  # detections that are drawn, those that cost most


class WorstImages(ValidationPictures):
    """Log the images of each validation that cost most AP50, as `val_worst/1` (the worst), `val_worst/2`, ...

    Each says in its title what its mistakes cost of mean AP, by kind: see `costs_of_mistakes`; the costs of all images
    add up to what is missing to 1. Drawn are missed objects, detections that are right, the 8 that cost most, however
    low their scores, and the best at an object that is found in the wrong place or as another class alone.

    The images of all processes take part. The worst are read again from the data, so that none are kept in memory: with
    data that does not give an image and its target by its `image_id` nothing is drawn. Costs the matching of all
    detections once more, and the reading and drawing of these images, about 20 ms each.

    Args:
        images: How many; 0: no pictures.
        every_n_validations: Which validations are drawn: see `DrawnValidations`.
    """

    def __init__(self, images: int = 4, every_n_validations: int | None = None) -> None:
        super().__init__(images, every_n_validations)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw them; Lightning calls this before the module resets its metrics."""
        assert isinstance(pl_module, FasterRCNNModule)
        if not self.due_on_all(trainer) or not pl_module.scheme.detects:
            return
        pl_module.val_ap.compute()  # of all processes
        if not trainer.is_global_zero:
            return
        split, names = pl_module.val_ap.evaluated(), pl_module.class_names
        labels = [label for label, name in enumerate(names, start=1) if name in pl_module.val_ap.only]
        found, objects = split.detections, split.ground_truth
        cost, object_cost = costs_of_mistakes(evaluate_voc(found, objects, labels), objects)
        total = np.zeros(len(split.image_id))  # bincount of nothing is of whole numbers
        total += np.bincount(np.searchsorted(split.image_id, found.image_id), cost, len(split.image_id))
        total += np.bincount(np.searchsorted(split.image_id, objects.image_id), object_cost, len(split.image_id))
        worst = [row for row in np.argsort(-total, kind="stable")[: self.images].tolist() if total[row] > 0]
        for rank, row in enumerate(worst, start=1):
            sample = _read_again(trainer, int(split.image_id[row]))
            if sample is not None:
                image, target = sample
                mine = np.flatnonzero(found.image_id == split.image_id[row])
                its = np.flatnonzero(objects.image_id == split.image_id[row])
                own, there = found.take(mine), objects.take(its)
                errors = break_down_errors(own, there, labels)  # matches are within an image
                blamed = blamed_detections(own, errors)
                reason = reason_of(errors, blamed, cost[mine], object_cost[its])
                title = f"{printable(target['file_name'])}: costs {total[row]:.4f} of AP50; {reason}"
                costly = np.argsort(-cost[mine], kind="stable")[:_MISTAKES]
                shown = errors.matched.flags == TRUE_POSITIVE
                shown[costly[cost[mine][costly] > 0]] = True
                shown[blamed[(object_cost[its] > 0) & (blamed >= 0)]] = True
                picture = draw_mistakes(image, own, there, errors, shown, names, title)
                self.log_picture(trainer, f"val_worst/{rank}", picture)


def blamed_detections(detections: Detections, errors: ErrorBreakdown) -> IntArray:
    """Return the index (G,) of the best scored mistake that points at each object, by its class or place; -1: none."""
    blamed = np.full(len(errors.missed), -1, dtype=np.int64)
    pointing = np.flatnonzero(np.isin(errors.kind, [KINDS.index("classification"), KINDS.index("localisation")]))
    for index in pointing[np.argsort(detections.score[pointing], kind="stable")].tolist():
        blamed[errors.target[index]] = index
    return blamed


def reason_of(
    errors: ErrorBreakdown, blamed: IntArray, cost: NDArray[np.float64], object_cost: NDArray[np.float64]
) -> str:
    """Return what the mistakes on an image cost by kind, the dearest first, such as `missed 0.0180, duplicate 0.0021`.

    Args:
        errors: Of the image, D detections and G objects.
        blamed: The detection to whose kind each object falls if it is not found, (G,); -1: it is missed.
        cost: Of each detection, (D,).
        object_cost: Of each object, (G,).
    """
    costs = dict.fromkeys(KINDS, 0.0)
    for kind, of_detection in zip(errors.kind.tolist(), cost.tolist(), strict=True):
        costs[KINDS[kind]] += of_detection  # 0 for those that are no mistake
    for index, of_object in zip(blamed.tolist(), object_cost.tolist(), strict=True):
        costs["missed" if index < 0 else KINDS[errors.kind[index]]] += of_object
    dearest = sorted((kind for kind in KINDS if costs[kind] > 0), key=lambda kind: -costs[kind])
    return ", ".join(f"{LOOKS[kind].text} {costs[kind]:.4f}" for kind in dearest)


def _read_again(trainer: pl.Trainer, image_id: int) -> tuple[Tensor, Mapping[str, Any]] | None:
    """Return an image of the validation and its target; None where the data does not give them by `image_id`."""
    try:
        image, target = validation_data(trainer)[image_id]
    except (IndexError, KeyError, TypeError, ValueError, NotImplementedError):
        return None
    return (image, target) if isinstance(target, Mapping) and int(target["image_id"]) == image_id else None
