"""What can be known of a grid's cells before any of them runs: bad values, missing data, bad anchors, steps."""

import json
import math
from collections.abc import Sequence

from jsonargparse import Namespace

from datamodules.detection_datamodule import DetectionDataModule
from datamodules.detection_dataset import DetectionDataset
from detector.anchors import AnchorConfig, AnchorGenerator
from detector.backbones import backbone_strides
from detector.backbones.base import BackboneConfig
from detector.errors import InputError
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.training.optimization import OptimizerConfig
from experiments.ablation.plan import Plan, hashed_options
from experiments.anchors.warnings import audit_dataset
from experiments.dataset.formats import data_module_of

Detector = tuple[AnchorConfig, Sequence[int], ImageConfig, RPNConfig, str]
"""What an audit has to know of one: anchors, strides, image, rpn, difficult."""


def _detector(model: Namespace) -> Detector:
    """Build the configs of a detector, which refuse bad values; return those that matter to an audit.

    Raises:
        InputError: A value out of its range, or options that do not go together.
    """
    anchors, backbone = AnchorConfig(**model.anchors.as_dict()), BackboneConfig(**model.backbone.as_dict())
    strides = backbone_strides(backbone.name, backbone.model, backbone.levels)
    AnchorGenerator(anchors, strides)  # refuses lists that do not fit the levels
    image, rpn = ImageConfig(**model.image.as_dict()), RPNConfig(**model.rpn.as_dict())
    RoIConfig(**model.roi.as_dict())
    OptimizerConfig(**model.optimizer.as_dict())
    return anchors, strides, image, rpn, model.difficult


class Checks:
    """What is known of all cells beforehand: their options, data and, on some images, anchors are looked at.

    Unless data is needed, a dataset that is not there is a note, not an error. Each cell sees so many GPUs.

    Attributes:
        steps: Optimiser steps of each cell, in order; None where unknown.
        lines: What is wrong with the anchors of each setting, and why something could not be checked.

    Raises:
        InputError: A cell cannot run; names it.
    """

    def __init__(self, plan: Plan, need_data: bool = True, gpus: int = 0) -> None:
        self.steps: list[int | None] = []
        self._evaluated = plan.grid.evaluate is not None
        self._need_data = need_data
        self._notes: list[str] = []
        self._modules: dict[str, DetectionDataModule | None] = {}
        self._audits: dict[str, Sequence[str]] = {}
        warnings: dict[str, Sequence[str]] = {}
        for cell in plan.cells:
            try:
                devices = devices_of(cell.config.trainer, gpus)
                detector, dataset = _detector(cell.config.model), self._dataset(cell.config)
            except InputError as error:
                raise InputError(f"{plan.grid.path}: cell {cell.name}: {error}") from None
            if dataset is None:
                self.steps.append(0 if self._evaluated else None)
            else:
                self.steps.append(_steps(cell.config, len(dataset), devices))
                warnings[cell.setting or cell.name] = self._audit(cell.config, detector, dataset)
        self.lines = [f"warning: {setting}: {'; '.join(texts)}" for setting, texts in warnings.items() if texts]
        self.lines += [f"note: {note}" for note in self._notes]

    def _dataset(self, config: Namespace) -> DetectionDataset | None:
        """Return the training data of a cell, all of whose annotations are read; None where it need not be there.

        Raises:
            InputError: It should be there and is not, or something is wrong with it.
        """
        options = {key: value for key, value in config.data.as_dict().items() if key != "seed"}
        key = json.dumps([config.data_format, options], sort_keys=True, default=str)
        if key not in self._modules:
            try:
                module: DetectionDataModule = data_module_of(config.data_format)(**options)
                module.setup(("test" if config.data.get("test_splits") else "validate") if self._evaluated else None)
                self._modules[key] = module
            except InputError as error:
                if self._need_data and not config.data.get("download"):
                    raise
                self._notes.append(f"data is not there, so anchors are not audited ({error})")
                self._modules[key] = None
        found = self._modules[key]
        return found.train_dataset if found is not None and not self._evaluated else None

    def _audit(self, config: Namespace, detector: Detector, dataset: DetectionDataset) -> Sequence[str]:
        """Return the warnings of an audit on at most 1000 images, and no more than can be read in a second."""
        parts = ("model.anchors.", "model.image.", "model.rpn.", "model.backbone.", "model.difficult", "data.")
        options = {key: value for key, value in hashed_options(config).items() if key.startswith(parts)}
        key = json.dumps(options, sort_keys=True)
        if key not in self._audits:
            result = audit_dataset(dataset, *detector)
            part = "" if result.images == len(dataset) else f" (from {result.images} of {len(dataset)} images)"
            self._audits[key] = [line + part for line in result.warnings]
        return self._audits[key]


def devices_of(trainer: Namespace, gpus: int) -> int:
    """Return how many devices a training uses on machines where it sees so many GPUs.

    Raises:
        InputError: It asks for more GPUs than it sees.
    """
    asked, on_gpus = trainer.devices, bool(gpus) and trainer.accelerator in ("auto", "gpu", "cuda")
    if str(asked) in ("auto", "-1"):
        count = last = gpus if on_gpus else 1
    elif isinstance(asked, list) or "," in str(asked):
        indices = [int(part) for part in (asked if isinstance(asked, list) else asked.split(",")) if str(part).strip()]
        count, last = len(indices), max(indices) + 1
    else:
        count = last = int(asked)
    if on_gpus and last > gpus:
        raise InputError(
            f"trainer.devices {asked}: a cell sees {gpus} GPU{'s' * (gpus > 1)}; give --gpus_per_run {last}, or "
            "trainer.devices auto"
        )
    return count * int(trainer.num_nodes)


def _steps(config: Namespace, images: int, devices: int) -> int | None:
    """Return the optimiser steps of a training; None where its options do not tell."""
    trainer = config.trainer
    batches = max(1, images // (config.data.batch_size * devices))
    if isinstance(trainer.limit_train_batches, int):
        batches = min(batches, trainer.limit_train_batches)
    elif trainer.limit_train_batches is not None:
        batches = int(batches * trainer.limit_train_batches)
    an_epoch: int = math.ceil(batches / trainer.accumulate_grad_batches)
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is None and not limits:
        return 1000 * an_epoch  # Lightning's default
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * an_epoch)
    return min(limits, default=None)
