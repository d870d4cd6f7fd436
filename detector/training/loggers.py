"""The TensorBoard log of a run, whose first page answers first, and pictures for loggers of any kind."""

import io
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
from lightning_fabric.loggers.logger import rank_zero_experiment
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from detector.training.event_files import quick_checksums

PictureWriter = Callable[[str, NDArray[np.uint8], int], Any]
"""Is given a tag, a picture (H, W, 3) and a step."""


class RunTensorBoard(TensorBoardLogger):
    """The TensorBoard log of a run: Lightning's, but losses are among its first cards, and its `epoch` is not.

    Event files are read in the order of the times in their names: a session's is named after those that are there, also
    where the clock was ahead when these were written.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the writer of the event file."""
        if self._experiment is None:
            from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

            numbers = (path.name.split(".")[3] for path in Path(self.log_dir).glob("events.out.tfevents.*"))
            after = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
            quick_checksums()
            times = chain([max(time.time(), after)], iter(time.time, None))  # of the name, then as they are
            with patch.object(event_file_writer, "time", SimpleNamespace(time=times.__next__)):
                return super().experiment
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, the epoch as `weights/epoch`, losses such as `val/loss_rpn_cls` also as `losses/val_rpn_cls`."""
        shown = {"weights/epoch" if name == "epoch" else name: value for name, value in metrics.items()}
        losses = (name for name in metrics if name.startswith(("train/loss", "val/loss")))
        super().log_metrics(shown | {f"losses/{name.replace('/loss', '')}": metrics[name] for name in losses}, step)


def picture_writers(trainer: pl.Trainer, photos: bool = False) -> list[PictureWriter]:
    """Return a function for each logger that takes pictures.

    TensorBoard, Weights & Biases and MLflow show them; in the folder of a CSVLogger they are `<tag>/<step>.png`.

    Args:
        trainer: Whose loggers they are.
        photos: Whether the pictures are photographs, which TensorBoard gets as JPEG, in a tenth of the time.
    """
    writers = [_picture_writer(logger, photos) for logger in trainer.loggers]
    return [write for write in writers if write is not None]


def _picture_writer(logger: Any, photos: bool) -> PictureWriter | None:
    if isinstance(logger, TensorBoardLogger):
        return lambda tag, picture, step: _add_image(logger.experiment, tag, picture, step, photos)
    if hasattr(logger, "log_image"):  # as Weights & Biases has it
        return lambda tag, picture, step: logger.log_image(tag, [picture], step)
    if isinstance(logger, MLFlowLogger):
        return lambda tag, picture, step: logger.experiment.log_image(logger.run_id, picture, _file(tag, step))
    if isinstance(logger, CSVLogger):
        return lambda tag, picture, step: _save(picture, Path(logger.log_dir, _file(tag, step)))
    return None


def _add_image(writer: Any, tag: str, picture: NDArray[np.uint8], step: int, photo: bool) -> None:
    """Do as `SummaryWriter.add_image` does in a fraction of its time, most of which goes into compressing more."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    if photo:
        Image.fromarray(picture).save(buffer, "JPEG", quality=80, subsampling=0)  # with the colours of thin lines
    else:
        Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    height, width, channels = picture.shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _file(tag: str, step: int) -> str:
    parts = [part for part in tag.split("/") if part not in ("", ".", "..")]  # file names of a dataset are in tags
    return "/".join([*parts, f"{step:06d}.png"])


def _save(picture: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
