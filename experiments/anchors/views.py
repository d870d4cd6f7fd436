"""Objects at the sizes at which they are trained: plain arrays.

Shapes: `N` images, `M` objects, `S` anchor shapes (levels times anchors per location). Sizes are (height, width).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detector.anchors import AnchorConfig
from detector.image_batch import ImageConfig, resized_size
from experiments.anchors.coverage import (
    AnchorLattices,
    Array,
    Windows,
    all_locations,
    anchor_lattices,
    best_ious,
    legal_locations,
)


@dataclass(frozen=True, eq=False)
class TrainingView:
    """Objects as the network sees them in training, at one of the sizes that images are resized to.

    Attributes:
        sizes: (N, 2) of the resized images.
        boxes: (M, 4) float32 xyxy in their pixels.
        image: (M,) position of each object's image, ascending.
    """

    sizes: Array
    boxes: Array
    image: Array

    def lattices_and_windows(self, anchors: AnchorConfig, strides: Sequence[int]) -> tuple[AnchorLattices, Windows]:
        """Return all anchors, and the locations at which they are used."""
        height, width = self.sizes.max(axis=0, initial=1).tolist()
        lattices = anchor_lattices(anchors, strides, (height, width))
        locations = legal_locations if anchors.straddling == "drop" else all_locations
        return lattices, locations(lattices, self.sizes)

    def take(self, objects: Array) -> "TrainingView":
        """Return some objects (indices), each as if alone in its image: one size per object."""
        owners = self.image[objects]
        return TrainingView(self.sizes[owners], self.boxes[objects], np.arange(len(owners)))

    def best_ious(self, anchors: AnchorConfig, strides: Sequence[int]) -> Array:
        """Return the best IoU (M,) of each object, float64: that of the audit up to rounding, and faster."""
        if not len(self.boxes):
            return np.zeros(0)
        lattices, windows = self.lattices_and_windows(anchors, strides)
        parts = [slice(start, start + 20_000) for start in range(0, len(self.boxes), 20_000)]
        found = [best_ious(lattices, windows.take(self.image[part]), self.boxes[part])[0] for part in parts]
        return np.concatenate([ious.max(axis=1) for ious in found])


def training_views(config: ImageConfig, sizes: Array, boxes: Array, image: Array) -> list[TrainingView]:
    """Return one view for each of `config.shortest_side`, which training draws with equal probability.

    Args:
        config: Sizes after resizing.
        sizes: (N, 2) of the original images.
        boxes: (M, 4) xyxy in pixels of the original images.
        image: (M,) position of each object's image in `sizes`, ascending.
    """
    distinct, position = np.unique(sizes, axis=0, return_inverse=True)
    views = []
    for shortest in config.shortest_side:
        resized = [resized_size((height, width), shortest, config.longest_side) for height, width in distinct.tolist()]
        new_sizes = np.array(resized, np.int64).reshape(-1, 2)[position.reshape(-1)]
        # `image_batch.rescale` does the same: the factor is rounded to float32 before it is applied.
        factors = (new_sizes / sizes).astype(np.float32)[image][:, [1, 0, 1, 0]]
        views.append(TrainingView(new_sizes, boxes.astype(np.float32) * factors, image))
    return views
