"""The files of a run: metrics.json and predictions.json."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from detector.files import earlier_results, read_metrics, without_nan, write_json
from detector.kernels.cpu_paths import cpu_kernels
from detector.metrics.coco_results import coco_results
from detector.training.lightning_module import FasterRCNNModule
from detector.training.lightning_private import log_at_step


class RunFiles(pl.Callback):
    """Write the run's final numbers and detections into its folder.

    `metrics.json` holds the metrics of the last validation or test under their logged names (null where undefined),
    `epoch` and `step` (completed ones), `seed`, `git_commit` and, of a CPU, `cpu_kernels`, the special paths that the
    layers took; a test adds to what the training wrote.
    Where `classes` chose some, `classes` holds them, and the metrics are of these alone.
    `proposal_recall_by_size` has for `val` and `test` the number `k` of proposals and their recall at IoU .50:.05:.95.
    `predictions.json` holds the detections of the last validation or test as COCO results, with file and class names;
    on data in COCO's format under the ids of the annotation file, so that COCO's own tools take them.

    Tests are counted, because choosing among several makes the test split a validation split: `metrics.json` has
    `test_count`, `test_checkpoint` of the last test and `test_history`, the numbers of the earlier ones, oldest first.
    From the second test of a run on, a line on stderr says so before it starts.

    Args:
        folder: The run folder.

    Attributes:
        losses: Where a validation takes the place of the end of a training that was killed: the losses of that.
        predictions: The detections of the last validation or test, as COCO results, on rank 0.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._progress: dict[str, int] = {}
        self._trained = False
        self._recall_by_size: dict[str, dict[str, Any]] = {}
        self.losses: dict[str, float] | None = None
        self.predictions: list[dict[str, Any]] | None = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let an evaluation log where the training that wrote its checkpoint did; Lightning would at step 0."""
        if trainer.state.fn != "fit":
            log_at_step(trainer, max(0, checkpoint["global_step"] - 1))
            trainer.fit_loop.epoch_progress.current.completed = checkpoint["epoch"]
            self._progress = {"epoch": _completed_epochs(checkpoint), "step": checkpoint["global_step"]}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the losses of the training: it may be killed before it writes them, and only be validated then."""
        losses = {name: value for name, value in _metrics(trainer).items() if name.startswith("train/loss")}
        checkpoint["losses"] = losses

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the run has been tested before."""
        before = self._read()
        count = before.get("test_count", 0)
        if count and trainer.is_global_zero:
            value = before.get("test/AP50_voc07")
            last = "" if value is None else f" (the last one gave test/AP50_voc07 {value:.4f})"
            print(
                f"warning: {self.folder} has been tested {count} time{'s' * (count > 1)} before{last}; the best of "
                "several tests is no test result. All are kept in metrics.json as test_history",
                file=sys.stderr,
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the detections; Lightning calls this before the module resets its metrics."""
        if not trainer.sanity_checking:
            self._keep(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the detections."""
        self._keep(trainer, pl_module, "test")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write at the end of `frcnn validate`; a training writes once, at its end."""
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write at the end of `frcnn test`."""
        self._write(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there will be something to write; a training that was at its end does not come here."""
        self._trained = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write at the end of `frcnn fit`."""
        if self._trained:
            self._write(trainer)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, FasterRCNNModule)
        metric = pl_module.val_ap if stage == "val" else pl_module.test_ap
        recall = pl_module.val_recall if stage == "val" else pl_module.test_recall
        loader: Any = trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders
        metric.compute()  # all ranks: gathers
        recall.compute()
        if trainer.is_global_zero:
            by_size = {size: without_nan(values.tolist()) for size, values in recall.recall_by_size().items()}
            self._recall_by_size[stage] = {"k": recall.detail_k, **by_size}
            data = loader.dataset
            ids = getattr(data, "image_ids", None), getattr(data, "category_ids", None)
            self.predictions = coco_results(metric.results(), data.file_names, pl_module.class_names, *ids)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        if self.predictions is not None:
            write_json(self.folder / "predictions.json", self.predictions, indent=None)
        module = trainer.lightning_module
        assert isinstance(module, FasterRCNNModule)
        chosen, before = module.val_ap.only, self._read()
        classes = None if chosen == module.val_ap.class_names else list(chosen)
        renewed = tuple(f"{part}/" for part, fn in (("val", "validate"), ("test", "test")) if trainer.state.fn == fn)
        of_others = ("val/", "test/") if before.get("classes") != classes else renewed
        of_others += () if self.losses is None else ("train/",)
        of_training = trainer.state.fn == "fit" or self.losses is not None
        kept = () if of_training else ("epoch", "step", "seed", "cpu_kernels")
        write_json(
            self.folder / "metrics.json",
            without_nan(self.losses or {})
            | {name: value for name, value in before.items() if not name.startswith(of_others) and name != "classes"}
            | ({} if classes is None else {"classes": classes})
            | (self._test_record(trainer, before) if trainer.state.fn == "test" else {})
            | without_nan(_metrics(trainer))
            | {
                "proposal_recall_by_size": before.get("proposal_recall_by_size", {}) | self._recall_by_size,
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
                "git_commit": git_commit(),
            }
            | ({"cpu_kernels": cpu_kernels()} if trainer.strategy.root_device.type == "cpu" else {})
            | self._progress
            | {key: before[key] for key in kept if key in before},
        )

    def _read(self) -> dict[str, Any]:
        return earlier_results(self.folder / "metrics.json", read_metrics)

    @staticmethod
    def _test_record(trainer: pl.Trainer, before: dict[str, Any]) -> dict[str, Any]:
        history = list(before.get("test_history", []))
        if before.get("test_count", 0):
            kept = ("test_checkpoint", "git_commit")
            history.append({k: v for k, v in before.items() if k.startswith("test/") or k in kept})
        return {
            "test_count": before.get("test_count", 0) + 1,
            "test_checkpoint": str(trainer.ckpt_path),
            "test_history": history,
        }


def _completed_epochs(checkpoint: Mapping[str, Any]) -> int:
    """Return what `Trainer.current_epoch` is after a training that ended with this checkpoint.

    Lightning saves while it still counts the epoch as running, also after its last batch.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    if loop.get("epoch_loop.batch_progress", {}).get("is_last_batch"):
        return int(loop["epoch_progress"]["current"]["ready"])
    return int(checkpoint["epoch"])


def git_commit() -> str | None:
    """Return the commit of this code, with "-dirty" where it is changed; None outside a git checkout."""
    here = Path(__file__).resolve().parents[3]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("val/", "test/", "train/")) and not name.endswith(("_step", "_epoch"))
    }
