"""Why AP is as it is: confusion, precision and recall, scores, reliability, errors; in TensorBoard and as files."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger

from detector.files import earlier_results, read_object, without_nan, write_json, write_whole
from detector.metrics.curve_figures import confusion_figure, curves_figure, png
from detector.metrics.curves import SCORE_THRESHOLDS, curves_of
from detector.training.callbacks.inside_steps import log_scalars
from detector.training.callbacks.run_files import RunFiles
from detector.training.callbacks.validation_pictures import DrawnValidations
from detector.training.lightning_module import FasterRCNNModule
from detector.training.lightning_private import step_of_logs
from detector.training.loggers import picture_writers


class DetectionCurves(pl.Callback):
    """Log what an average precision hides; see `detector.metrics.curves` for what each number is.

    At every validation the scalars `val_errors/<kind>`, the gain in AP50 from correcting one kind of error alone, and
    `val_errors/calibration`. At the first validation of a training, the last and some between, in `frcnn validate` and
    in `frcnn test` (as `test_...`) also

    - precision and recall of each class, `val_precision_recall/<class>`, in TensorBoard's page of PR curves;
    - the pictures `val_curves/curves` (precision and recall, recall of proposals over IoU, histograms of scores,
      reliability) and `val_curves/confusion`, in all loggers that take pictures;
    - in the run's folder the same pictures, `curves/val_curves.png` and `curves/val_confusion.png`, and all numbers,
      `curves.json`.

    Costs 10 ms at each validation of 60 images of MiniVOC on one CPU core, which take 550 ms, and 0.3 s where pictures
    are drawn.

    Args:
        every_n_validations: At which validations pictures are drawn and files written, see `DrawnValidations`; 0:
            nothing at all in a training.
        score_threshold: Detections with lower scores are left out of the confusion matrix; all else counts every one.
    """

    def __init__(self, every_n_validations: int | None = None, score_threshold: float = 0.5) -> None:
        self.drawn = DrawnValidations(every_n_validations)
        self.score_threshold = score_threshold
        self._undrawn: dict[str, Any] | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether pictures are due."""
        self.drawn.begin(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a validation; Lightning calls this before the module resets its metrics."""
        if not trainer.sanity_checking and (self.drawn.every_n_validations != 0 or trainer.state.fn != "fit"):
            self._log(trainer, pl_module, "val", self.drawn.due)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a test."""
        self._log(trainer, pl_module, "test", True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last validation, where nobody knew that it was."""
        if self._undrawn is not None:
            self._draw(trainer, "val", self._undrawn)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, drawn: bool) -> None:
        assert isinstance(pl_module, FasterRCNNModule)
        if not pl_module.scheme.detects:
            return
        metrics = pl_module.val_ap, pl_module.val_recall
        ap, recall = metrics if stage == "val" else (pl_module.test_ap, pl_module.test_recall)
        ap.compute()  # all ranks: gathers
        recall.compute()
        if not trainer.is_global_zero:
            return
        made = curves_of(ap.of_chosen_classes(), ap.only, recall, self.score_threshold)
        made = {"epoch": trainer.current_epoch, "step": step_of_logs(trainer)} | made
        scalars = made["errors"]["gain"] | {"calibration": made["scores"]["calibration_error"]}
        log_scalars(
            trainer, {f"{stage}_errors/{name}": v for name, v in scalars.items() if math.isfinite(v)}, made["step"]
        )
        self._undrawn = None if drawn else made
        if drawn:
            self._draw(trainer, stage, made)

    def _draw(self, trainer: pl.Trainer, stage: str, made: dict[str, Any]) -> None:
        folder = next((Path(one.folder) for one in trainer.callbacks if isinstance(one, RunFiles)), None)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _add_pr_curves(logger, stage, made)
        title = f"{stage}, epoch {made['epoch']}, step {made['step']}"
        for name, draw in (("curves", curves_figure), ("confusion", confusion_figure)):
            content = png(draw({title: made}), dpi=100)
            writers = picture_writers(trainer)
            picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) if writers else None
            for write in writers:
                assert picture is not None
                write(f"{stage}_curves/{name}", picture, made["step"])
            if folder is not None:
                write_whole(folder / "curves" / f"{stage}_{name}.png", content)
        if folder is not None:
            path = folder / "curves.json"
            before = earlier_results(path, lambda file: read_object(file, {}))
            write_json(path, before | {stage: without_nan(made)}, indent=None)


def _add_pr_curves(logger: TensorBoardLogger, stage: str, made: dict[str, Any]) -> None:
    for name, one in made["precision_recall"].items():
        if one["objects"]:
            true, false = np.array(one["true_positives"]), np.array(one["false_positives"])
            columns = true, false, np.zeros_like(true), one["objects"] - true
            logger.experiment.add_pr_curve_raw(
                f"{stage}_precision_recall/{name}",
                *columns,
                np.nan_to_num(one["precision"]),
                one["recall"],
                made["step"],
                num_thresholds=len(SCORE_THRESHOLDS),
            )
