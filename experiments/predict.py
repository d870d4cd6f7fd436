"""`frcnn predict`: image files -> annotated images and predictions.json."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import write_jpeg

from datamodules.detection_datamodule import collate
from datamodules.image_files import ImageFiles, find_images
from detector.callbacks.drawing import draw_detections
from detector.callbacks.run_files import coco_results, write_json
from detector.errors import InputError
from detector.lightning_module import FasterRCNNModule
from experiments.host_memory import keep_freed_memory
from experiments.precision import resolve_precision


class DrawPredictions(pl.Callback):
    """Save each image with its detections while predicting, and collect the detections.

    Args:
        output: Folder for the pictures.
        names: File names of the images by image id.
        score_threshold: Detections below are not drawn.
    """

    def __init__(self, output: Path, names: Sequence[str], score_threshold: float) -> None:
        self.output = output
        self.names = names
        self.score_threshold = score_threshold
        self.results: list[dict[str, Any]] = []
        self.drawn = 0

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
            self.drawn += int((found["scores"] >= self.score_threshold).sum())
            self._save(draw_detections(image, found, pl_module.class_names, self.score_threshold, min_side=400), index)

    def _save(self, picture: Tensor, index: int) -> None:
        path = self.output / Path(self.names[index]).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(picture.contiguous(), str(path), quality=92)


def predict(
    ckpt_path: str,
    images: str,
    output: str,
    score_threshold: float = 0.5,
    batch_size: int = 1,
    accelerator: str = "auto",
    precision: str = "32-true",
    flip: bool = False,
    shortest_sides: list[int] | None = None,
) -> None:
    """Detect objects in a file or in all images of a folder; see `frcnn predict --help`.

    Without `flip` and `shortest_sides` an image is seen as the checkpoint's own options say.

    Raises:
        InputError: A missing or unreadable checkpoint or image, or a folder without images.
    """
    if not 0 <= score_threshold <= 1:
        raise InputError(f"--score_threshold {score_threshold}: must be in 0..1")
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size}: must be at least 1")
    folder, names = find_images(images)
    module = FasterRCNNModule.from_checkpoint(ckpt_path)
    if flip or shortest_sides:
        image = module.model.image_config
        module.model.image_config = replace(
            image,
            test_flip=flip or image.test_flip,
            test_shortest_sides=shortest_sides or image.test_shortest_sides,
        )
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    drawing = DrawPredictions(target, names, score_threshold)
    try:
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=resolve_precision(precision, accelerator, devices=1),
            logger=False,
            enable_checkpointing=False,
            callbacks=[drawing],
            enable_model_summary=False,
            inference_mode=True,
        )
    except (ValueError, MisconfigurationException) as error:
        raise InputError(f"--accelerator {accelerator} and --precision {precision}: {error}") from error
    keep_freed_memory(trainer.strategy.root_device)
    loader = DataLoader(ImageFiles(folder, names), batch_size=batch_size, collate_fn=collate)
    trainer.predict(module, loader, return_predictions=False)
    write_json(target / "predictions.json", drawing.results, indent=None)
    print(f"{len(names)} images, {drawing.drawn} detections drawn (score >= {score_threshold:g}), in {target}")
