"""A fixed set of validation images in loggers, with ground truth and detections."""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from detector.drawing import draw_detections
from detector.errors import printable
from detector.training.lightning_module import FasterRCNNModule
from detector.training.loggers import picture_writers

SHORTEST_SIDE = 320  # pixels: smaller pictures are enlarged, so that their captions can be read
LARGEST_SIDE = 2048  # pixels: a log of many larger pictures is too large for TensorBoard


class DetectionImages(pl.Callback):
    """Log the first validation images at every validation, as `val_images/<file name>`.

    Ground truth is white and dashed, detections coloured by class. The same images each time, so that the slider of
    TensorBoard shows the detector learning. Weights & Biases and MLflow get them too, and a CSVLogger as files; without
    a logger nothing is drawn.

    Args:
        images: How many.
        score_threshold: Detections below this score are not drawn.
    """

    def __init__(self, images: int = 8, score_threshold: float = 0.5) -> None:
        self.images = images
        self.score_threshold = score_threshold

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images of this batch that belong to the set."""
        writers = picture_writers(trainer)
        if trainer.sanity_checking or not trainer.is_global_zero or not writers:
            return
        assert isinstance(pl_module, FasterRCNNModule)
        # Rank r holds images r, r + world size, ...: the first rank draws its share of the first images.
        for image, target, detections in zip(*batch, outputs["detections"], strict=True):
            if int(target["image_id"]) < self.images:
                picture = self.draw(image, target, detections, pl_module.class_names).permute(1, 2, 0).numpy()
                for write in writers:
                    write(f"val_images/{printable(target['file_name'])}", picture, trainer.global_step)

    def draw(
        self, image: Tensor, target: dict[str, Any], detections: dict[str, Tensor], class_names: list[str]
    ) -> Tensor:
        """Return a picture (3, H, W) uint8 of an image with its ground truth and detections."""
        captions = [
            class_names[label - 1] + (" (difficult)" if difficult else "")
            for label, difficult in zip(target["labels"].tolist(), target["difficult"].tolist(), strict=True)
        ]
        return draw_detections(
            *(image, detections, class_names, self.score_threshold, target["boxes"], captions),
            min_side=SHORTEST_SIDE,
            max_side=LARGEST_SIDE,
        )
