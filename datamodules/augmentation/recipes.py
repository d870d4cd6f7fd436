"""Training-time augmentation: recipes by name, or a list of class paths.

Images are not resized here: `detector/image_batch.py` does that.

An object that a step cuts is dropped when less than a quarter of its area is left, or when a side of
less than one pixel is left (unless it was thinner before and is not cut). An image may end up without objects.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from random import Random
from typing import Any, Final

import numpy as np

from datamodules.augmentation.mixing import CopyPasteBoxes, MixUp, Mosaic
from datamodules.augmentation.samples import Sample
from datamodules.augmentation.transforms import (
    ColorJitter,
    HorizontalFlip,
    LargeScaleJitter,
    MinIoUCrop,
    MultiScale,
    Step,
)
from detector.errors import InputError, brief
from detector.parts import find_class

# albumentations asks PyPI for its newest version when it is imported; nothing here touches the network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

# What `--data.augmentation` takes: a name, or class paths with arguments.
Augmentation = list[dict[str, Any]] | str

_NAMED: Final[dict[str, Callable[[], list[Step | MultiScale]]]] = {
    "none": list,
    "flip": lambda: [HorizontalFlip(p=0.5)],
    "photometric": lambda: [HorizontalFlip(p=0.5), ColorJitter()],
    "ssd_crop": lambda: [MinIoUCrop(), HorizontalFlip(p=0.5), ColorJitter()],
    "multiscale": lambda: [HorizontalFlip(p=0.5), MultiScale()],
    "lsj": lambda: [LargeScaleJitter(), HorizontalFlip(p=0.5)],
    "mosaic": lambda: [Mosaic(), HorizontalFlip(p=0.5), ColorJitter()],
    "mixup": lambda: [MixUp(), HorizontalFlip(p=0.5), ColorJitter()],
    "copy_paste_boxes": lambda: [CopyPasteBoxes(), HorizontalFlip(p=0.5), ColorJitter()],
}
AUGMENTATIONS: Final = tuple(_NAMED)
_LIBRARIES: Final = {"albumentations.": "albumentations_step", "torchvision.transforms.v2.": "torchvision_step"}


class Recipe:
    """Steps applied one after the other, from one source of randomness.

    Args:
        steps: With at most one `MultiScale` among them, whose place does not matter.
    """

    def __init__(self, steps: Sequence[Step | MultiScale]) -> None:
        self.steps = [step for step in steps if isinstance(step, Step)]
        scales = [step for step in steps if isinstance(step, MultiScale)]
        if len(scales) > 1:
            raise InputError("--data.augmentation names MultiScale twice; give all factors to one")
        self.multi_scale = scales[0] if scales else None

    def __call__(
        self, sample: Sample, seed: np.random.SeedSequence, draw_partner: Callable[[Random], Sample]
    ) -> tuple[Sample, float | None]:
        """Augment one sample; the outcome depends on the arguments alone, not on what was drawn before.

        Args:
            sample: Is not changed.
            seed: Source of all randomness; is not changed.
            draw_partner: Gives another image of the dataset, chosen by the generator that it takes.

        Returns:
            The augmented sample, and the factor of the shortest side that was drawn, or None without `MultiScale`.
        """
        rng = Random(int.from_bytes(seed.generate_state(4).tobytes(), "little"))
        for step in self.steps:
            sample = step(sample, rng, lambda: draw_partner(rng))
        return sample, self.multi_scale.draw(rng) if self.multi_scale else None


def build_augmentation(augmentation: Augmentation) -> Recipe | None:
    """Build the recipe of a name or list, or None for "none" and an empty list.

    - `none`: the image as it is.
    - `flip`: horizontal flip with probability 0.5 (the Faster R-CNN paper's only augmentation).
    - `photometric`: flip, and with probability 0.8 brightness x 0.75..1.25, contrast and saturation x 0.6..1.4,
      hue +- 0.05 of a turn.
    - `ssd_crop`: `MinIoUCrop`, then `photometric`.
    - `multiscale`: flip, and the shortest side times 0.6 to 1 (`MultiScale`).
    - `lsj`: `LargeScaleJitter` by 0.1 to 2 into a square of the image's longer side, then flip.
    - `mosaic`, `mixup`, `copy_paste_boxes`: with probability 0.5 `Mosaic`, `MixUp`, `CopyPasteBoxes`; then
      `photometric`.

    A list holds `{class_path: ..., init_args: {...}}`: transforms of albumentations or `torchvision.transforms.v2`, and
    classes of `datamodules.augmentation.transforms` and `datamodules.augmentation.mixing`, or derived from any of them.

    Raises:
        InputError: For any other name, a class that cannot be found or is none of these, and bad arguments.
    """
    if isinstance(augmentation, str):
        if augmentation not in _NAMED:
            raise InputError(
                f"--data.augmentation {augmentation!r} is unknown; choose one of {', '.join(AUGMENTATIONS)}, or give "
                "a list such as [{class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}]"
            )
        steps: list[Any] = list(_NAMED[augmentation]())
    else:
        steps = [_instantiate(item) for item in augmentation]
    return Recipe(_group(steps)) if steps else None


def _group(steps: list[Any]) -> list[Step | MultiScale]:
    """Make one step of neighbouring transforms of a library."""
    grouped: list[Step | MultiScale] = []
    for library, neighbours in itertools.groupby(steps, lambda step: _library(type(step))):
        transforms = list(neighbours)
        grouped += transforms if library is None else [library.STEP(transforms)]
    return grouped


def _library(cls: type) -> Any:
    """Return the module that makes steps of a library's classes, which takes a second to import; None for others."""
    bases = [f"{base.__module__}." for base in cls.__mro__]
    found = [module for library, module in _LIBRARIES.items() if any(base.startswith(library) for base in bases)]
    return import_module(f"datamodules.augmentation.{found[0]}") if found else None


def _instantiate(item: Any) -> Any:
    """Build an object from {class_path, init_args}; arguments may hold further ones, as those of `OneOf` do."""
    where = "--data.augmentation"
    if not isinstance(item, dict) or "class_path" not in item or set(item) - {"class_path", "init_args"}:
        raise InputError(f"{where}: {item!r} is not of the form {{class_path: ..., init_args: {{...}}}}")
    path, arguments = str(item["class_path"]), item.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise InputError(f"{where}: {path}: init_args is {arguments!r}; it must map names to values")
    cls: type = find_class(f"{where}: {path}", path, object)
    values = {str(name): _resolve(value) for name, value in arguments.items()}
    try:
        if issubclass(cls, Step | MultiScale):
            return cls(**values)
        library = _library(cls)
        if library is None:
            raise InputError(
                "it is no transform of albumentations or torchvision.transforms.v2, and neither a Step of "
                "datamodules.augmentation.transforms"
            )
        return library.build_transform(cls, values)
    except InputError as error:
        raise InputError(f"{where}: {path}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, OSError) as error:  # whatever a stranger's class raises
        raise InputError(f"{where}: {path}: {brief(error)}") from error


def _resolve(value: Any) -> Any:
    if isinstance(value, list):
        return [_resolve(item) for item in value]
    return _instantiate(value) if isinstance(value, dict) and "class_path" in value else value
