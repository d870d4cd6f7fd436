"""Which feature levels propose the objects, and of which sizes."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from detector.image_batch import to_original
from detector.metrics import ProposalRecall
from detector.step_record import StepRecord
from detector.training.callbacks.inside_steps import InsideSteps, log_scalars
from detector.training.lightning_module import FasterRCNNModule


class RecallDetails(InsideSteps):
    """Log the recall of proposals at IoU 0.5 in validation, by object size and by feature level.

    Of the best k proposals of an image, as `val/proposal_recall@<k>`, with k 300 or what there are:

    - `val_recall/small`, `medium`, `large`: the recall of objects of COCO's sizes;
    - `val_recall/stride<s>`: the share of all objects that proposals of this level alone cover; several levels may
      cover an object. Where there is one level only, it is not logged; nor with test-time augmentation.

    Costs the overlaps of proposals and objects once more per validation, with several levels.

    Args:
        by_level: Whether to log levels.
        by_size: Whether to log sizes.
    """

    def __init__(self, by_level: bool = True, by_size: bool = True) -> None:
        super().__init__(every_n_steps=0)
        self.by_level = by_level
        self.by_size = by_size
        self._of_level: list[ProposalRecall] = []

    def wants_validation_batch(self, trainer: pl.Trainer, batch: Any) -> bool:
        """Return whether levels are to be told apart."""
        module = trainer.lightning_module
        assert isinstance(module, FasterRCNNModule)
        image = module.model.image_config
        several_views = image.test_flip or image.test_shortest_sides
        return self.by_level and len(module.model.backbone.strides) > 1 and not several_views

    def see_validation(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: StepRecord, batch: Any
    ) -> None:
        """Add the proposals of each level."""
        assert isinstance(pl_module, FasterRCNNModule) and record.batch is not None
        metrics = self._metrics(pl_module)
        k, ends = metrics[0].detail_k, list(accumulate(map(len, record.level_anchors)))
        by_level: Sequence[list[Tensor]] = [[] for _ in metrics]
        for image, found in enumerate(record.proposals):
            kept = found.kept[:k]
            boxes = to_original(found.boxes[kept], record.batch, image)
            levels = torch.bucketize(found.anchors[kept], torch.tensor(ends, device=boxes.device), right=True)
            for level, of_level in enumerate(by_level):
                of_level.append(boxes[levels == level])
        for metric, proposals in zip(metrics, by_level, strict=True):
            metric.update(proposals, batch[1])

    def _metrics(self, pl_module: FasterRCNNModule) -> list[ProposalRecall]:
        if not self._of_level:
            names, top_k = pl_module.class_names, [pl_module.val_recall.detail_k]
            strides = pl_module.model.backbone.strides
            self._of_level = [ProposalRecall(names, top_k).to(pl_module.device) for _ in strides]
            for metric in self._of_level:
                metric.only = pl_module.val_recall.only
        return self._of_level

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log; Lightning calls this before the module resets its metrics."""
        assert isinstance(pl_module, FasterRCNNModule)
        if trainer.sanity_checking:
            return
        found: dict[str, float] = {}
        if self.by_size:
            pl_module.val_recall.compute()  # of all processes
            found |= {size: float(recalls[0]) for size, recalls in pl_module.val_recall.recall_by_size().items()}
            found.pop("all")
        if self.wants_validation_batch(trainer, None):
            metrics = self._metrics(pl_module)
            name = f"proposal_recall@{metrics[0].detail_k}"
            rows = zip(pl_module.model.backbone.strides, metrics, strict=True)
            found |= {f"stride{stride}": float(metric.compute()[name]) for stride, metric in rows}
        self._of_level = []
        if trainer.is_global_zero:
            log_scalars(trainer, {f"val_recall/{name}": value for name, value in found.items() if math.isfinite(value)})
