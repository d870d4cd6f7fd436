"""What would fail late in a run is found before its first step: folders, file names, and metrics to watch."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateFinder, Timer

from detector.errors import InputError
from detector.faster_rcnn import LOSS_NAMES
from detector.files import check_space
from detector.metrics import DetectionAP, ProposalRecall
from detector.training.callbacks.checkpoints import BestCheckpoint, size_of
from detector.training.callbacks.validation_losses import ValidationLosses
from detector.training.lightning_module import FasterRCNNModule

LONGEST_NAME = 255  # bytes of a file name, on the file systems of Linux, macOS and Windows
OURS = ("pytorch_lightning.", "lightning.", "detector.", "experiments.", "datamodules.")


def check_writable(folder: Path, option: str) -> None:
    """Raise InputError unless files can be written into a folder, which need not exist yet; leave nothing behind.

    Args:
        folder: Where results are going to be.
        option: By which the user chose it, for the message.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"{option} {folder}: {there} is a file; a folder is needed")
        with tempfile.TemporaryDirectory(prefix=".frcnn_", dir=there):
            pass
        too_long = [part for part in folder.parts if len(part.encode()) > LONGEST_NAME]
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot be written to ({error.strerror})") from error
    if too_long:
        raise InputError(f"{option} {folder}: a name of more than {LONGEST_NAME} bytes")


def check_room(run_folder: Path, model: FasterRCNNModule) -> None:
    """Raise InputError unless there is room for a run's checkpoints: best, last, the one before, and one in writing."""
    state = size_of(model.state_dict())
    trained = size_of([parameter for parameter in model.parameters() if parameter.requires_grad])
    options = model.optimizer_config
    one = state * (2 if options.ema_decay else 1) + trained * (1 if options.name == "sgd" else 2)
    there = sum(path.is_file() for path in (run_folder / "checkpoints").glob("*.ckpt"))
    check_space(run_folder, one * max(1, 4 - there), str(run_folder / "checkpoints"))


def check_devkit_names(class_names: Sequence[str]) -> None:
    """Raise InputError for a class after which the devkit's file of its detections cannot be named."""
    for name in class_names:
        file = f"comp4_det_test_{name}.txt"
        if "/" in name or not name.isprintable() or len(file.encode()) > LONGEST_NAME:
            raise InputError(
                f"--save_devkit_results: there can be no file {file!r} for the class {name!r}; predictions.json takes "
                "any name"
            )


def check_monitors(callbacks: Iterable[pl.Callback], model: FasterRCNNModule, validates: bool) -> None:
    """Raise InputError for a callback that watches a metric which no training logs, or waits for the wrong end of one.

    Where there are callbacks of the user's own, which may log anything, names are not judged.

    Args:
        callbacks: Of the Trainer.
        model: Whose metrics they are.
        validates: Whether there are validations.
    """
    callbacks = list(callbacks)
    if model.scheme.name == "alternating" and any(isinstance(one, LearningRateFinder) for one in callbacks):
        raise InputError(
            "--trainer.callbacks LearningRateFinder: --model.training_scheme alternating has four optimisers; find the "
            "rate of a joint training"
        )
    known = {*_training_metrics(model), *(_validation_metrics(model) if validates else ())}
    if validates and any(isinstance(one, ValidationLosses) and one.every_n_images for one in callbacks):
        known |= {f"val/{name}" for name in (*LOSS_NAMES, "loss")}
    complete = all(type(callback).__module__.startswith(OURS) for callback in callbacks)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or isinstance(callback, BestCheckpoint):
            continue
        where = f"--trainer.callbacks {type(callback).__name__}: monitor {monitor}"
        if complete and monitor not in known | {"epoch", "step"}:
            shown = sorted(name for name in known if "_class/" not in name)
            without = "" if validates else " (there are no validations: --trainer.limit_val_batches 0)"
            raise InputError(f"{where}: there is no such metric{without}; there are {', '.join(shown)}")
        losses, validation = monitor.startswith(("train/loss", "val/loss")), monitor.startswith("val/")
        better = "min" if losses else "max" if validation else None
        if better is not None and getattr(callback, "mode", better) != better:
            end = "lower" if better == "min" else "higher"
            raise InputError(f"{where}: the better the detector, the {end} it is; write mode: {better}")


def _training_metrics(model: FasterRCNNModule) -> set[str]:
    losses = (f"train/{name}" for name in (*LOSS_NAMES, "loss"))
    return {*losses, "train/images_per_second", *model.scheme.logged()}


def _validation_metrics(model: FasterRCNNModule) -> set[str]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        metrics = (
            DetectionAP(model.class_names).compute()
            | ProposalRecall(model.class_names, model.val_recall.top_k).compute()
        )
    return {f"val/{name}" for name in metrics}


def is_endless(trainer: pl.Trainer) -> bool:
    """Return whether only time or early stopping ends a training."""
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return trainer.max_steps == -1 and (trainer.max_epochs == -1 or (trainer.max_epochs is None and timed))
