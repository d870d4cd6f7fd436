"""A row for each run in a logger's table of hyperparameters; in TensorBoard the page HPARAMS."""

import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Final, get_type_hints

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from detector.errors import shortened, shown_options, value_text
from detector.training.lightning_module import FasterRCNNModule
from detector.training.lightning_private import step_of_logs

FAILED: Final = ".failed"
"""Suffix of the event file that says that a run failed; gone when the run goes on."""
_SUCCESS, _FAILURE = 1, 2  # of TensorBoard's enumeration


class Hyperparameters(pl.Callback):
    """Give the run its row of hyperparameters: from its first step on, with a status at its end.

    TensorBoard sorts columns by name, those first in which runs differ, and shows five of options and five of metrics.
    So the axes of a grid are named `Axis/<name>`, and the main metrics of validations and tests are logged once more as
    `AP_and_recall/<val|test>_<metric>`, which are the first curves of its scalars, too. A run of a grid has its axes
    and its seed; any other run has its seed and all options of the detector, as `model/optimizer/lr`. A column is of
    one type in all runs: numbers are those that can be nothing else. Other loggers get all options of every run.

    Costs a few writes per run and validation.

    Args:
        axes: Of a run that is part of a grid: what varies there -> this run's value.
        enabled: Whether there is a row at all.
    """

    def __init__(self, axes: Mapping[str, str | int] | None = None, enabled: bool = True) -> None:
        self.axes = dict(axes or {})
        self.enabled = enabled
        self._begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the row, after callbacks such as Lightning's LearningRateFinder have changed options."""
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the row of `frcnn validate`."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the row of `frcnn test`."""
        self._begin(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the main metrics."""
        if not trainer.sanity_checking:
            self._log_metrics(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the main metrics."""
        self._log_metrics(trainer, pl_module, "test")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the success."""
        for logger in self._tensorboards(trainer):
            _write(logger.experiment, _end(_SUCCESS))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Note the failure of a training, in a file of its own: TensorBoard believes the first end that it reads."""
        if self._begun and trainer.state.fn == "fit":
            from torch.utils.tensorboard import SummaryWriter

            for logger in self._tensorboards(trainer):
                with (
                    contextlib.suppress(OSError),  # a full disk may be what ended it
                    SummaryWriter(logger.log_dir, filename_suffix=FAILED) as writer,
                ):
                    _write(writer, _end(_FAILURE))

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = True
        options = shown_options(pl_module.hparams, "/")
        numbers = _numbers(get_type_hints(FasterRCNNModule.__init__))
        axes = {"seed": int(os.environ.get("PL_GLOBAL_SEED", "0"))} | self.axes
        row = {
            key: value if key in numbers else shortened("none" if value is None else value_text(value), 80)
            for key, value in options.items()
        }
        named = {f"Axis/{key}": value for key, value in self.axes.items() if key != "seed"}
        named = {"seed": axes["seed"]} | (named or {f"model/{key}": value for key, value in row.items()})
        for logger in trainer.loggers if self.enabled else []:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(axes | row)
        for logger in self._tensorboards(trainer):
            from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # type: ignore[import-untyped]

            for file in Path(logger.log_dir).glob(f"events.*{FAILED}"):
                file.unlink(missing_ok=True)
            _write(logger.experiment, hparams_pb(named, trial_id="", start_time_secs=time.time()))

    def _tensorboards(self, trainer: pl.Trainer) -> list[TensorBoardLogger]:
        loggers = trainer.loggers if self.enabled and trainer.is_global_zero else []
        return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]

    def _log_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, FasterRCNNModule)
        for logger in self._tensorboards(trainer):
            for name in ("AP", "AP50_voc07", f"proposal_recall@{pl_module.val_recall.detail_k}"):
                value = float(trainer.callback_metrics.get(f"{stage}/{name}", math.nan))
                if math.isfinite(value):
                    logger.experiment.add_scalar(f"AP_and_recall/{stage}_{name}", value, step_of_logs(trainer))
            logger.experiment.flush()


def _write(writer: Any, summary: Any) -> None:
    writer._get_file_writer().add_summary(summary)  # as Lightning and PyTorch write hyperparameters
    writer.flush()


def _end(status: int) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2  # type: ignore[import-untyped]

    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def _numbers(hints: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Return the names of options that are always numbers, as `optimizer/lr`."""
    found = set()
    for name, hint in hints.items():
        if is_dataclass(hint):
            found |= _numbers(get_type_hints(hint), f"{prefix}{name}/")
        elif hint in (int, float):
            found.add(f"{prefix}{name}")
    return found
