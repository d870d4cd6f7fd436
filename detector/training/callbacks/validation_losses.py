"""The losses in validation, from which overfitting shows."""

from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor

from detector.faster_rcnn import LOSS_NAMES, FasterRCNN
from detector.image_batch import ImageBatch, ground_truth
from detector.metrics.flat_states import FlatStateMetric, first_of_each_image, image_ids_of
from detector.rpn import RPNOutput
from detector.step_record import StepRecord, unrecorded
from detector.training.callbacks.inside_steps import InsideSteps
from detector.training.lightning_module import FasterRCNNModule

NAMES: Final = (*LOSS_NAMES, "loss")


class ValidationLosses(InsideSteps):
    """Log the losses of training in validation: `val/loss_rpn_cls`, `_rpn_reg`, `_roi_cls`, `_roi_reg` and `val/loss`.

    Each is the mean over images of `FasterRCNN.losses` of one image. The network is in evaluation mode (no dropout,
    batch norm's stored statistics), but samples, proposals before NMS and after are as many as in training. Random
    draws depend on the image alone, so that validations, runs and numbers of processes compare; those of training are
    left as they are. Alternating training logs the losses of the networks that there are.

    Features and predictions are those of the validation's own pass, so only proposals, matching and RoI heads cost
    anything: of an image that is looked at a quarter of its time (65 beside 283 ms with MobileNetV2 C4 at 320 pixels,
    one thread). With test-time augmentation the features are the first view's.

    Args:
        every_n_images: Look at the images whose index is a multiple of this, the same in each validation; 1: at all;
            0: no losses. Odd numbers share the work out among 2, 4 or 8 processes.
    """

    def __init__(self, every_n_images: int = 11) -> None:
        super().__init__(every_n_steps=0)
        self.every_n_images = every_n_images
        self._losses: LossesOfImages | None = None

    def wants_validation_batch(self, trainer: pl.Trainer, batch: Any) -> bool:
        """Return whether an image of the batch is looked at."""
        return bool(self._chosen(batch))

    def _chosen(self, batch: Any) -> list[int]:
        every = self.every_n_images
        return [i for i, target in enumerate(batch[1]) if every and int(target["image_id"]) % every == 0]

    def see_validation(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: StepRecord, batch: Any
    ) -> None:
        """Compute the losses of the chosen images."""
        assert isinstance(pl_module, FasterRCNNModule)
        if self._losses is None:
            self._losses = LossesOfImages().to(pl_module.device)
        places = self._chosen(batch)
        with trainer.precision_plugin.val_step_context(), unrecorded():
            losses = [losses_of_image(pl_module.model, record, place, batch[1][place]) for place in places]
        self._losses.update(losses, [batch[1][place] for place in places])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means over all processes' images."""
        assert isinstance(pl_module, FasterRCNNModule)
        if trainer.sanity_checking or not self.every_n_images:
            return
        metric = self._losses or LossesOfImages().to(pl_module.device)
        self._losses = None
        left_out = () if pl_module.scheme.detects else LOSS_NAMES[2:]
        for name, value in metric.compute().items():
            if name not in left_out:
                pl_module.log(f"val/{name}", value, rank_zero_only=False)


def losses_of_image(model: FasterRCNN, record: StepRecord, place: int, target: dict[str, Any]) -> dict[str, Tensor]:
    """Return the losses of one image of a batch that was evaluated, as `FasterRCNN.losses` does.

    Those of the RPN alone where only it was computed. All random draws follow from `image_id` in the target.
    """
    assert record.batch is not None
    own = slice(place, place + 1)
    tensors, sizes, original_sizes = record.batch
    batch = ImageBatch(tensors[own], sizes[own], original_sizes[own])
    logits, deltas = ([level[own] for level in levels] for levels in (record.level_logits, record.level_deltas))
    output = RPNOutput(logits, deltas, list(record.level_anchors))
    truths, features = ground_truth([target], batch), [level[own] for level in record.features]
    devices = [tensors.device] if tensors.device.type == "cuda" else []
    mode, model.rpn.training = model.rpn.training, True  # so many proposals as in training; its layers keep their mode
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(int(target["image_id"]))
            if features:
                return model.losses_of(features, output, batch, truths)
            return model.with_total(model.rpn.losses(output, batch, truths, model.difficult))
    finally:
        model.rpn.training = mode


class LossesOfImages(FlatStateMetric):
    """The losses of some images of a split, of which each counts once."""

    def __init__(self) -> None:
        super().__init__((), ("image_id",), ("losses",))

    def update(self, losses: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        """Add some or all of `NAMES` of each image; a loss that is not given is 0."""
        nothing = losses[0]["loss"] * 0
        rows = [torch.stack([of_image.get(name, nothing) for name in NAMES]) for of_image in losses]
        self.append(image_id=image_ids_of(targets), losses=torch.stack(rows))

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each of `NAMES` over the images on all processes; nothing without any."""
        rows = self.array("losses").reshape(-1, len(NAMES))[first_of_each_image(self.array("image_id"))]
        return self.tensors(dict(zip(NAMES, rows.mean(axis=0, dtype=float).tolist(), strict=True))) if len(rows) else {}
