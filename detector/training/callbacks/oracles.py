"""Average precision of a validation if a part of the detector were right: which part is to blame, and how much."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from detector.errors import InputError
from detector.files import without_nan, write_json
from detector.metrics import DetectionAP
from detector.metrics.detection_ap import average_precisions_by_name
from detector.metrics.oracles import right_boxes, right_labels
from detector.step_record import unrecorded
from detector.training.lightning_module import FasterRCNNModule

ORACLES = {"labels": right_labels, "boxes": right_boxes}
SHOWN = ("AP50_voc07", "AP50_voc", "AP")


class Oracles(pl.Callback):
    """Evaluate a validation's detections as they are, and with one part of the detector replaced by a perfect one.

    - `proposals`: the boxes of all objects of an image, difficult ones and those of other classes too, are its only
      proposals; the RoI heads score, move and suppress them as they do the RPN's.
    - `labels` and `boxes`: see `detector.metrics.oracles`.

    Writes `oracles.json`: `checkpoint`, `images` and `results`, which has the metrics (null where undefined) of the
    undisturbed `detector` and of each oracle. An oracle costs no time but `proposals`, which detects a second time.

    Args:
        folder: The folder to write into.
        oracles: Of `proposals`, `labels`, `boxes`; or `all`.

    Attributes:
        results: By `detector` or oracle the metrics, under their names without the prefix of a split.
    """

    def __init__(self, folder: str | Path, oracles: Sequence[str]) -> None:
        self.folder = Path(folder)
        known = ("proposals", *ORACLES)
        self.oracles = [name for name in known if name in oracles or "all" in oracles]
        self.results: dict[str, dict[str, float]] = {}
        self._from_objects: DetectionAP | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew.

        Raises:
            InputError: There is no network that detects yet.
        """
        assert isinstance(pl_module, FasterRCNNModule)
        if not pl_module.scheme.detects:
            raise InputError(f"{trainer.ckpt_path}: oracles need a network that detects; this one only proposes yet")
        if "proposals" in self.oracles:
            self._from_objects = DetectionAP(pl_module.class_names).to(pl_module.device)
            self._from_objects.only = pl_module.val_ap.only

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Detect from the objects' boxes."""
        if self._from_objects is not None:
            assert isinstance(pl_module, FasterRCNNModule)
            images, targets = batch
            with trainer.precision_plugin.val_step_context(), unrecorded():
                found, _ = pl_module.model(images, [target["boxes"].float() for target in targets])
            self._from_objects.update(found, targets)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute from all processes' detections; Lightning calls this before the module resets its metrics."""
        assert isinstance(pl_module, FasterRCNNModule)
        metric = pl_module.val_ap
        self.results = {"detector": _floats(metric)}
        if self._from_objects is not None:
            self.results["proposals"] = _floats(self._from_objects)
        split, labels = metric.of_chosen_classes(), range(1, len(metric.only) + 1)
        for name, corrected in ORACLES.items():
            if name in self.oracles:
                right = replace(split, detections=corrected(split.detections, split.ground_truth, labels))
                self.results[name] = average_precisions_by_name(right, metric.only)
        if trainer.is_global_zero:
            images = len(split.image_id)
            document = {"checkpoint": str(trainer.ckpt_path), "images": images, "results": self.results}
            write_json(self.folder / "oracles.json", without_nan(document))

    def table(self) -> str:
        """Return a row for the detector, and for each oracle its gain, in points of AP."""
        lines = ["", "AP in %, and what it would gain if a part of the detector were right:"]
        lines.append(f"{'':10}" + "".join(f"{name:>10}{'':9}" for name in SHOWN))
        before = self.results["detector"]
        for name, metrics in self.results.items():
            cells = [f"{100 * metrics[key]:.2f}" for key in SHOWN]
            gains = ["" if name == "detector" else f" ({100 * (metrics[key] - before[key]):+.2f})" for key in SHOWN]
            lines.append(f"{name:10}" + "".join(f"{cell:>10}{gain:9}" for cell, gain in zip(cells, gains, strict=True)))
        return "\n".join(line.rstrip() for line in lines)


def _floats(metric: DetectionAP) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}
