"""Transforms of albumentations as a step of an augmentation."""

import warnings
from random import Random
from typing import Any

import albumentations as A
import numpy as np
from albumentations.augmentations.crops.transforms import CropSizeError
from albumentations.core.type_definitions import Targets

from datamodules.augmentation.samples import MIN_SIDE, MIN_VISIBLE, Sample
from datamodules.augmentation.transforms import Partner, Step
from detector.errors import InputError, brief


def build_transform(cls: type, arguments: dict[str, Any]) -> Any:
    """Make an instance of a class of albumentations.

    Raises:
        InputError: It is no such class, or would not take boxes along.
        ValueError, TypeError: As the class does, and for arguments that it does not know (albumentations only warns).
    """
    if not issubclass(cls, A.BasicTransform | A.BaseCompose) or issubclass(cls, A.Compose):
        raise InputError("it is no transform of albumentations that can be a part of others")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not valid for transform.*")
        try:
            transform = cls(**arguments)
        except UserWarning as warning:
            raise ValueError(str(warning)) from warning
    if isinstance(transform, A.DualTransform) and Targets.BBOXES not in np.atleast_1d(transform._targets):
        raise InputError("it does not take boxes along")
    return transform


class AlbumentationsStep(Step):
    """Neighbouring transforms of albumentations, in one `Compose`.

    Objects are dropped by the rule of `recipes.py`; cut off is what lies outside the image after each transform.
    """

    def __init__(self, transforms: list[Any]) -> None:
        super().__init__(p=1.0)
        self.names = ", ".join(type(transform).__name__ for transform in transforms)
        params = A.BboxParams(format="pascal_voc", min_area=1e-2, min_visibility=MIN_VISIBLE, clip=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Got processor for bboxes, but no transform to process it")
            self.compose = A.Compose(transforms, bbox_params=params)

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the transformed sample.

        Raises:
            InputError: The result is no uint8 image of three channels, or a transform fails; names them.
        """
        # One generator shared by all transforms. `Compose.set_random_seed` would give each transform its own generator
        # with the same seed: two steps would then draw the same numbers and happen together.
        self.compose.set_random_state(np.random.default_rng(rng.getrandbits(128)), rng)
        # Indices travel with the boxes: albumentations would return labels as floats.
        rows = np.column_stack([sample.boxes, np.arange(len(sample.boxes))]).astype(np.float32)
        try:
            result = self.compose(image=sample.image.copy(), bboxes=rows)
        except (ValueError, TypeError, KeyError, CropSizeError) as error:
            height, width = sample.image.shape[:2]
            raise InputError(
                f"--data.augmentation: {self.names}: {brief(error)} (width {width}, height {height})"
            ) from error
        image = result["image"]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(
                f"--data.augmentation: {self.names}: an image came out as {getattr(image, 'dtype', type(image))} "
                f"{tuple(getattr(image, 'shape', ()))}; it must stay uint8 with three channels (normalising is the "
                "network's part: --model.image)"
            )
        found = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 5)
        limit = np.array([image.shape[1], image.shape[0]] * 2, dtype=np.float32)
        boxes, which = np.clip(found[:, :4], 0, limit), np.rint(found[:, 4]).astype(np.int64)
        before, after = (sample.boxes[:, 2:] - sample.boxes[:, :2])[which], boxes[:, 2:] - boxes[:, :2]
        keep = (after >= np.minimum(MIN_SIDE, before) - 1e-2).all(1) & (after > 0).all(1)
        return sample.take(image, boxes[keep], which[keep])


STEP = AlbumentationsStep
