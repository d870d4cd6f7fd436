"""The TensorBoard log of a run, whose first page answers first, and pictures for loggers of any kind."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

PictureWriter = Callable[[str, NDArray[np.uint8], int], Any]
"""Is given a tag, a picture (H, W, 3) and a step."""


class RunTensorBoard(TensorBoardLogger):
    """The TensorBoard log of a run: Lightning's, but its `epoch` is not among the first cards."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, the epoch as `weights/epoch`."""
        super().log_metrics({"weights/epoch" if k == "epoch" else k: value for k, value in metrics.items()}, step)


def picture_writers(trainer: pl.Trainer) -> list[PictureWriter]:
    """Return a function for each logger that takes pictures.

    TensorBoard, Weights & Biases and MLflow show them; in the folder of a CSVLogger they are `<tag>/<step>.png`.
    """
    writers = [_picture_writer(logger) for logger in trainer.loggers]
    return [write for write in writers if write is not None]


def _picture_writer(logger: Any) -> PictureWriter | None:
    if isinstance(logger, TensorBoardLogger):
        return lambda tag, picture, step: _add_png(logger.experiment, tag, picture, step)
    if hasattr(logger, "log_image"):  # as Weights & Biases has it
        return lambda tag, picture, step: logger.log_image(tag, [picture], step)
    if isinstance(logger, MLFlowLogger):
        return lambda tag, picture, step: logger.experiment.log_image(logger.run_id, picture, _file(tag, step))
    if isinstance(logger, CSVLogger):
        return lambda tag, picture, step: _save(picture, Path(logger.log_dir, _file(tag, step)))
    return None


def _add_png(writer: Any, tag: str, picture: NDArray[np.uint8], step: int) -> None:
    """Do as `SummaryWriter.add_image` does in a quarter of its time, most of which goes into compressing more."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    buffer = io.BytesIO()
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
