"""Class paths of earlier versions, which config files name, found where the classes live now.

`install` lets `import datamodules.transforms` give `datamodules.augmentation.transforms`, for whoever resolves a
class path: augmentations, LightningCLI's callbacks, loggers and plugins. Checkpoints hold no class paths.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

FORMER: Final = {
    "datamodules.albumentations_step": "datamodules.augmentation.albumentations_step",
    "datamodules.augmentations": "datamodules.augmentation.recipes",
    "datamodules.coco_datamodule": "datamodules.coco.datamodule",
    "datamodules.mixing": "datamodules.augmentation.mixing",
    "datamodules.samples": "datamodules.augmentation.samples",
    "datamodules.transforms": "datamodules.augmentation.transforms",
    "datamodules.voc_datamodule": "datamodules.voc.datamodule",
    "detector.atomic_checkpoints": "detector.training.callbacks.checkpoints",
    "detector.callbacks": "detector.training.callbacks",
    "detector.callbacks.best_checkpoint": "detector.training.callbacks.checkpoints",
    "detector.callbacks.detection_images": "detector.training.callbacks.detection_images",
    "detector.callbacks.progress": "detector.training.callbacks.progress",
    "detector.callbacks.resumable": "detector.training.callbacks.checkpoints",
    "detector.callbacks.run_files": "detector.training.callbacks.run_files",
    "detector.callbacks.throughput": "detector.training.callbacks.throughput",
    "detector.lightning_module": "detector.training.lightning_module",
    "detector.optimization": "detector.training.optimization",
    "experiments.anchor_warnings": "experiments.anchors.warnings",
    "experiments.cell_progress": "experiments.run.grid_progress",
    "experiments.lightning_cli": "experiments.run.lightning_cli",
    "experiments.precision": "experiments.run.precision",
}
"""Former name of a module -> the module that has its classes now."""


class _Finder(MetaPathFinder):
    """A finder before Python's own, which would load a file of a renamed package again, under its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _PresentModule(FORMER[fullname])) if fullname in FORMER else None


class _PresentModule(Loader):
    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the machinery has set that of the former name


def install() -> None:
    """Let former names be imported; does nothing the second time."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
