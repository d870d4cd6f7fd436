"""Transforms of torchvision (`torchvision.transforms.v2`), or of one's own derived from them, as a step."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image

from datamodules.augmentation.samples import Sample, cut
from datamodules.augmentation.transforms import Partner, Step
from detector.errors import InputError, brief

# Boxes that stay whole where they leave the image, so that it is known how much of them is seen; before torchvision
# 0.23 they come cut, and only those of which nothing is left are dropped.
_WHOLE = {"clamping_mode": None} if "clamping_mode" in signature(BoundingBoxes.__new__).parameters else {}


def build_transform(cls: type, arguments: dict[str, Any]) -> Any:
    """Make an instance of a class of torchvision, or derived from one.

    Raises:
        ValueError, TypeError: As the class does.
    """
    return cls(**arguments)


class TorchvisionStep(Step):
    """Neighbouring transforms of torchvision, applied one after the other.

    Each is given a dictionary: `image`, uint8 (3, H, W) RGB; `boxes`, float32 (K, 4) xyxy pixels; `labels`, int64 (K,),
    which of the G objects of the sample each box is of; and to be read alone `classes`, int64 (G,) in 1..C, and
    `difficult`, bool (G,). A transform that drops boxes drops their `labels`, as `SanitizeBoundingBoxes` does. Objects
    are dropped by the rule of `recipes.py` after each transform.
    """

    def __init__(self, transforms: list[Any]) -> None:
        super().__init__(p=1.0)
        self.transforms = [
            each for one in transforms for each in (one.transforms if type(one) is v2.Compose else [one])
        ]

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the transformed sample.

        Raises:
            InputError: The result is no uint8 image of three channels with a label for each box, or a transform fails;
                names it.
        """
        with _seeded(rng.getrandbits(32)):
            for transform in self.transforms:
                name = f"--data.augmentation: {type(transform).__name__}"
                try:
                    sample = _checked(sample, transform(_inputs(sample)))
                except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
                    height, width = sample.size
                    raise InputError(f"{name}: {brief(error)} (width {width}, height {height})") from error
        return sample


STEP = TorchvisionStep


def _inputs(sample: Sample) -> dict[str, Tensor]:
    boxes = torch.from_numpy(sample.boxes.copy())
    return {
        "image": Image(torch.from_numpy(sample.image.copy()).permute(2, 0, 1)),
        "boxes": BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=sample.size, **_WHOLE),
        "labels": torch.arange(len(boxes)),
        "classes": torch.from_numpy(sample.labels.copy()),
        "difficult": torch.from_numpy(sample.difficult.copy()),
    }


def _checked(sample: Sample, result: Any) -> Sample:
    """Return the sample of what a transform gives back; ValueError where it is none."""
    image, boxes, which = (
        result.get(key) if isinstance(result, dict) else None for key in ("image", "boxes", "labels")
    )
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        kind, shape = getattr(image, "dtype", type(image).__name__), tuple(getattr(image, "shape", ()))
        raise ValueError(
            f"an image came out as {kind} {shape}; it must stay uint8 with three channels (normalising "
            "is the network's part: --model.image)"
        )
    if not isinstance(boxes, BoundingBoxes) or not isinstance(which, Tensor) or len(boxes) != len(which):
        counts = [
            f"{type(one).__name__} of {len(one)}" if isinstance(one, Tensor) else "none" for one in (boxes, which)
        ]
        raise ValueError(
            f"boxes came out as {counts[0]}, labels as {counts[1]}; a BoundingBoxes with as many labels is due"
        )
    moved = v2.functional.convert_bounding_box_format(boxes, new_format=BoundingBoxFormat.XYXY)
    height, width = image.shape[1:]
    kept, of = which.numpy(), sample.boxes[which.numpy()]
    seen, rows = cut(of, moved.as_subclass(Tensor).numpy(), (0, 0, width, height))
    pixels = np.ascontiguousarray(image.as_subclass(Tensor).permute(1, 2, 0).numpy())
    return sample.take(pixels, seen, kept[rows])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let torch, NumPy and Python draw from a seed inside, and go on outside where they were."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs too
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
