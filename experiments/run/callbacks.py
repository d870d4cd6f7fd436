"""The callbacks that trainings and evaluations have without being asked; one's own of the same class replaces them."""

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint

from detector.training.callbacks.anchor_telemetry import AnchorTelemetry
from detector.training.callbacks.checkpoints import BestCheckpoint, SaveNowAndThen, SaveOnInterrupt
from detector.training.callbacks.detection_curves import DetectionCurves
from detector.training.callbacks.detection_images import DetectionImages
from detector.training.callbacks.distributions import Distributions
from detector.training.callbacks.gradient_norms import GradientNorms
from detector.training.callbacks.hyperparameters import Hyperparameters
from detector.training.callbacks.inside_images import InsideImages
from detector.training.callbacks.learning_rates import LearningRates
from detector.training.callbacks.recall_details import RecallDetails
from detector.training.callbacks.sample_counts import SampleCounts
from detector.training.callbacks.scalar_pages import ScalarPages
from detector.training.callbacks.throughput import Throughput
from detector.training.callbacks.validation_losses import ValidationLosses
from detector.training.callbacks.worst_images import WorstImages
from experiments.anchors.warnings import AnchorWarnings
from experiments.run.grid_progress import CellProgress, axes_of_environment


def training_callbacks(folder: Path, every: int, loggers: bool = True) -> list[pl.Callback]:
    """Return the callbacks that watch a training.

    Args:
        folder: The run folder.
        every: Optimiser steps between two logs.
        loggers: Whether there are any; without, those that only give something to loggers are left out.
    """
    axes = axes_of_environment()
    own = [Hyperparameters(axes), DetectionCurves(), Throughput(every), AnchorWarnings()]
    logged = [
        LearningRates(),
        GradientNorms(every),
        SampleCounts(log_every_n_steps=every),
        ValidationLosses(),
        RecallDetails(),
        DetectionImages(),
        InsideImages(),
        WorstImages(),
        AnchorTelemetry(),
        Distributions(),
        ScalarPages(),
    ]
    return [*own, *([CellProgress(folder)] if axes else []), *(logged if loggers else [])]


def checkpoint_callbacks(folder: Path, save_every_minutes: float) -> list[pl.Callback]:
    """Return the callbacks that keep the best and the last weights of a training in a folder."""
    best = BestCheckpoint(folder, filename="best", monitor="val/AP50_voc07", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(
        folder, filename="last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    return [best, last, SaveNowAndThen(folder / "last.ckpt", save_every_minutes), SaveOnInterrupt(folder / "last.ckpt")]


def without_replaced(usual: Sequence[pl.Callback], given: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return the usual callbacks but those of whose class one is given, which gets the axes of a grid, too.

    Lightning's `LearningRateMonitor` takes the place of `LearningRates`.
    """
    classes = {LearningRates if isinstance(one, LearningRateMonitor) else type(one) for one in given}
    for one in given:
        if isinstance(one, Hyperparameters):
            one.axes = one.axes or dict(axes_of_environment())
    return [callback for callback in usual if type(callback) not in classes]
