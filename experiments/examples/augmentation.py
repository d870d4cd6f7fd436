"""An augmentation of torchvision's kind, for pictures without an upper side: from the air, through a microscope."""

from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image


class QuarterTurns(v2.Transform):
    """Turn an image with its boxes by 0 to `most` quarters, all equally likely."""

    def __init__(self, most: int = 3) -> None:
        super().__init__()
        self.most = most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the number of quarters; the generator is seeded for each image and epoch."""
        return {"quarters": int(torch.randint(self.most + 1, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return a part of the sample: `Image` (3, H, W), `BoundingBoxes` (K, 4), or one that stays as it is."""
        if not isinstance(inpt, Image | BoundingBoxes):
            return inpt
        return v2.functional.rotate(inpt, 90.0 * params["quarters"], expand=True)
