"""`frcnn predict`: image files -> annotated images and predictions.json."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.detection_datamodule import collate
from datamodules.image_files import ImageFiles, find_images
from detector.errors import InputError, printable
from detector.files import write_json
from detector.metrics.coco_results import coco_results
from detector.training.callbacks.progress import LossProgressBar
from detector.training.lightning_module import FasterRCNNModule
from detector.use.drawing import draw_detections, is_saved_picture, save_picture
from detector.use.reading import Reading
from experiments.output import counted, writing
from experiments.run.host_memory import keep_freed_memory
from experiments.run.options import PredictOptions
from experiments.run.precision import check_precision, resolve_precision
from experiments.run.prediction_files import PREDICTIONS, check_output, picture_names


class DrawPredictions(pl.Callback):
    """Save each image with its detections while predicting, and collect the detections.

    Args:
        output: Folder for the pictures.
        names: File names of the images by image id.
        pictures: File names of their pictures.
        score_threshold: Detections below are not drawn.

    Attributes:
        results: Detections so far, as COCO results.
        done: Images so far.
        drawn: Detections drawn so far.
        unsaved: By name of an image: why its picture could not be written.
    """

    def __init__(self, output: Path, names: Sequence[str], pictures: Sequence[str], score_threshold: float) -> None:
        self.output = output
        self.names = names
        self.pictures = pictures
        self.score_threshold = score_threshold
        self.results: list[dict[str, Any]] = []
        self.done = 0
        self.drawn = 0
        self.unsaved: dict[str, str] = {}

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw and collect the images of a batch."""
        assert isinstance(pl_module, FasterRCNNModule)
        for image, target, found in zip(*batch, outputs, strict=True):
            index = int(target["image_id"])
            arrays = {
                key: found[plural].float().cpu().numpy() for key, plural in (("score", "scores"), ("box", "boxes"))
            }
            arrays["label"] = found["labels"].cpu().numpy()
            arrays["image_id"] = torch.full((len(found["labels"]),), index).numpy()
            self.results += coco_results(arrays, self.names, pl_module.class_names)
            self.done += 1
            self.drawn += int((found["scores"] >= self.score_threshold).sum())
            self._save(draw_detections(image, found, pl_module.class_names, self.score_threshold, min_side=400), index)
        if trainer.received_sigterm:  # which Lightning looks for in trainings and evaluations alone
            raise SIGTERMException

    def _save(self, picture: Tensor, index: int) -> None:
        try:
            save_picture(picture, self.output / self.pictures[index])
        except OSError as error:
            self.unsaved[self.names[index]] = f"its picture cannot be written ({error.strerror or error})"
        except InputError as error:  # it appeared meanwhile
            self.unsaved[self.names[index]] = str(error)


def predict(options: PredictOptions) -> int:
    """Detect objects in a file or in all images of a folder; see `frcnn predict --help`.

    Returns:
        The exit status: 1 if something had to be left out, images that cannot be read or pictures that cannot be
        written. Each is named on stderr.

    Raises:
        InputError: A missing or unreadable checkpoint, no image, or an output folder in which something of the user's
            would be overwritten.
    """
    check_precision(options.precision, "--precision")
    target = Path(options.output)
    found = find_images(options.images, ignore=lambda path: _is_below(path, target) and is_saved_picture(path))
    pictures = picture_names(found.names)
    module = _detector(options)
    check_output(target, Path(options.images), found, pictures)
    bits = module.bit_depth if options.data.bit_depth is None else options.data.bit_depth
    files = ImageFiles(found.folder, found.names, Reading(bits, options.data.max_pixels))
    drawing = DrawPredictions(target, found.names, pictures, options.score_threshold)
    trainer = _trainer(options, drawing)
    keep_freed_memory(trainer.strategy.root_device)
    ended = False
    try:
        loader = DataLoader(files, batch_size=options.batch_size, collate_fn=collate)
        trainer.predict(module, loader, return_predictions=False)
        ended = True
    finally:
        left_out = found.left_out | files.left_out | drawing.unsaved
        if ended or drawing.done:
            with writing(str(target / PREDICTIONS)):
                write_json(target / PREDICTIONS, drawing.results, indent=None)
        _say_what_is_left_out(left_out, found.folder)
        if not ended:
            kept = f"; {PREDICTIONS} holds these" if drawing.done else ""
            print(f"stopped after {drawing.done} of {counted(len(found.names), 'image')}{kept}", file=sys.stderr)
    print(
        f"{counted(drawing.done, 'image')}, {counted(drawing.drawn, 'detection')} drawn (score >= "
        f"{options.score_threshold:g}), in {printable(target)}" + (f"; {len(left_out)} left out" if left_out else "")
    )
    if drawing.results and not drawing.drawn:
        highest = max(one["score"] for one in drawing.results)
        print(f"the highest score is {highest:.3g}: --score_threshold {highest / 2:.1g} draws something")
    return int(bool(left_out))


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _detector(options: PredictOptions) -> FasterRCNNModule:
    module = FasterRCNNModule.from_checkpoint(options.ckpt_path)
    if options.flip or options.shortest_sides:
        image = module.model.image_config
        module.model.image_config = replace(
            image,
            test_flip=options.flip or image.test_flip,
            test_shortest_sides=options.shortest_sides or image.test_shortest_sides,
        )
    return module


def _trainer(options: PredictOptions, drawing: DrawPredictions) -> pl.Trainer:
    try:
        return pl.Trainer(
            accelerator=options.accelerator,
            devices=1,
            precision=resolve_precision(options.precision, options.accelerator, 1, option="--precision"),
            logger=False,
            enable_checkpointing=False,
            callbacks=[LossProgressBar(), drawing],
            enable_model_summary=False,
            inference_mode=True,
        )
    except (ValueError, MisconfigurationException) as error:
        raise InputError(f"--accelerator {options.accelerator} and --precision {options.precision}: {error}") from error


def _say_what_is_left_out(left_out: Mapping[str, str], folder: Path) -> None:
    for name, reason in left_out.items():
        place = str(folder / name)
        print(f"left out: {printable(reason if place in reason else f'{place}: {reason}')}", file=sys.stderr)
