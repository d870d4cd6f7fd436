"""How well anchors fit the objects, and whether targets and predictions of deltas are scaled alike: histograms."""

from typing import Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from detector import boxes as box_ops
from detector.boxes import pairwise_iou
from detector.step_record import StepRecord
from detector.training.callbacks.inside_steps import InsideSums, log_scalars
from detector.training.lightning_module import FasterRCNNModule

BINS: Final = 100
RANGES: Final = {
    "object_iou": (0.0, 1.0),
    **{f"{kind}/{d}": (-2.0, 2.0) for kind in ("rpn_target", "rpn_prediction") for d in ("dx", "dy", "dw", "dh")},
    **{f"{kind}/{d}": (-5.0, 5.0) for kind in ("roi_target", "roi_prediction") for d in ("dx", "dy", "dw", "dh")},
}
"""Histograms by name, and their range; what lies beyond counts in the last bin, but as it is in mean and deviation."""


class Distributions(InsideSums):
    """Log histograms of what the detector learns from and predicts, of some steps since the last log.

    In TensorBoard under `train_distributions/`, with mean and standard deviation as scalars `..._mean` and `..._std`:

    - `object_iou`: the best IoU of each object with an anchor that is used; difficult ones count only if they are kept;
    - `rpn_target/dx` and `dy`, `dw`, `dh`: deltas from sampled positive anchors to their objects, and `rpn_prediction`:
      what the RPN predicts there;
    - `roi_target/...`: those of sampled positive RoIs, less `roi.delta_mean` and divided by `roi.delta_std`: if these
      fit the data, the mean is 0 and the standard deviation 1; `roi_prediction`: the predictions for the RoI's class.

    Other loggers get the scalars alone. Costs 3 ms in ten steps of 470 ms each on two CPU cores (two images of 320
    pixels, MobileNetV2), logs included, or in each step that it sees five dozen small kernels on a GPU.

    Args:
        every_n_steps: How often to see inside a step, in optimiser steps; 0: no histograms at all.
        log_every_n_steps: How often to log.
    """

    def __init__(self, every_n_steps: int = 10, log_every_n_steps: int = 100) -> None:
        super().__init__(every_n_steps, log_every_n_steps)

    def sums_of(self, pl_module: FasterRCNNModule, record: StepRecord) -> Tensor:
        """Return a row for each of `RANGES`: counts of the bins, then sum and sum of squares, (17, BINS + 2)."""
        model = pl_module.model
        drop = model.rpn.anchor_generator.config.straddling == "drop"
        sums = dict.fromkeys(RANGES, torch.zeros(BINS + 2, device=record.level_anchors[0].device))
        assert record.batch is not None
        anchors = record.anchors
        for truth, size in zip(record.truths, record.batch.sizes, strict=True):
            used = anchors * box_ops.is_inside(anchors, size)[:, None] if drop else anchors
            best = pairwise_iou(truth.boxes, used).amax(dim=1)
            counted = torch.ones_like(truth.difficult) if model.difficult == "keep" else ~truth.difficult
            sums["object_iou"] = sums["object_iou"] + _sums(best[:, None], counted, *RANGES["object_iou"])[0]
        for kind, values, counted in _deltas(record):
            low, high = RANGES[f"{kind}/dx"]
            for name, row in zip(("dx", "dy", "dw", "dh"), _sums(values, counted, low, high), strict=True):
                sums[f"{kind}/{name}"] = row
        return torch.stack(list(sums.values()))

    def log_sums(self, trainer: pl.Trainer, pl_module: FasterRCNNModule, sums: Tensor) -> None:
        """Log the histograms of which there is something, and their means and standard deviations."""
        scalars = {}
        for (name, (low, high)), row in zip(RANGES.items(), sums.double(), strict=True):
            counts, total, squares = row[:BINS], float(row[BINS]), float(row[BINS + 1])
            number = float(counts.sum())
            if not number:
                continue
            mean = total / number
            scalars[f"train_distributions/{name}_mean"] = mean
            scalars[f"train_distributions/{name}_std"] = max(squares / number - mean**2, 0.0) ** 0.5
            within = counts.nonzero().flatten()  # a picture of the bins between the first and the last that hold some
            filled = slice(int(within[0]), int(within[-1]) + 1)
            edges = torch.linspace(low, high, BINS + 1)
            lower, upper = edges[:-1][filled].tolist(), edges[1:][filled].tolist()
            held = counts[filled].tolist()
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    tag, step = f"train_distributions/{name}", max(trainer.global_step - 1, 0)
                    logger.experiment.add_histogram_raw(
                        tag, lower[0], upper[-1], number, total, squares, upper, held, step
                    )
        log_scalars(trainer, scalars)


def _deltas(record: StepRecord) -> list[tuple[str, Tensor, Tensor]]:
    """Return the name of each kind of deltas that there is, its values (n, 4), and which of them count (n,)."""
    found = []
    if record.sampled_anchors:
        targets = torch.cat([drawn.deltas for drawn in record.sampled_anchors])
        predicted = [
            deltas[drawn.positives] for deltas, drawn in zip(record.deltas, record.sampled_anchors, strict=True)
        ]
        all_count = torch.ones_like(targets[:, 0], dtype=torch.bool)
        found += [("rpn_target", targets, all_count), ("rpn_prediction", torch.cat(predicted), all_count)]
    if record.sampled_rois:
        labels = torch.cat([rois.labels for rois in record.sampled_rois])
        targets = torch.cat([rois.deltas for rois in record.sampled_rois])
        columns = (labels - 1).clamp(0, record.roi_deltas.shape[1] - 1)
        own = record.roi_deltas[torch.arange(len(labels), device=labels.device), columns]
        found += [("roi_target", targets, labels > 0), ("roi_prediction", own, labels > 0)]
    return found


def _sums(values: Tensor, counted: Tensor, low: float, high: float) -> Tensor:
    """Return counts of bins, sum and sum of squares (k, BINS + 2) of those of the values (n, k) that count (n,)."""
    columns, weights = values.float().T, counted.float()
    bins = ((columns - low) * (BINS / (high - low))).long().clamp(0, BINS - 1)
    counts = torch.zeros(len(columns), BINS, device=values.device).scatter_add_(1, bins, weights.expand_as(columns))
    moments = torch.stack(((columns * weights).sum(1), (columns**2 * weights).sum(1)), dim=1)
    return torch.cat((counts, moments), dim=1)
