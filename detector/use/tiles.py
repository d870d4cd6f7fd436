"""Detection in large images: in overlapping tiles of the size that the network knows, merged over the whole image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_area

from detector.errors import InputError
from detector.post_processing import Candidates, suppression
from detector.roi_heads import RoIConfig

Detect = Callable[[Sequence[Tensor]], list[dict[str, Tensor]]]


def check_tiles(tile: int, overlap: float) -> None:
    """Raise InputError for tiles that cannot cover an image."""
    if tile < 16:
        raise InputError(f"tile {tile}: must be at least 16 pixels")
    if not 0 <= overlap < 0.9:
        raise InputError(f"tile_overlap {overlap}: must be in [0, 0.9)")


def starts(side: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles begin along a side, spread evenly, so that neighbours share at least `overlap` of a tile."""
    if side <= tile:
        return [0]
    steps = -(-(side - tile) // max(1, int(tile * (1 - overlap))))
    return [round(step * (side - tile) / steps) for step in range(steps + 1)]


def detect_in_tiles(
    detect: Detect, image: Tensor, tile: int, overlap: float, at_once: int, config: RoIConfig
) -> dict[str, Tensor]:
    """Return the detections of an image (3, H, W) that are found in its tiles.

    Within each class NMS merges those of all tiles. Before, a box that ends at the edge of its tile, where the object
    may go on, is left out if most of it lies in a box of its class that another tile shows whole.

    Args:
        detect: Returns the detections of images.
        image: In original pixels.
        tile: Sides of the tiles.
        overlap: Share of a tile that it has in common with its neighbour.
        at_once: How many tiles are detected in at a time.
        config: Thresholds of the network's own NMS.
    """
    height, width = image.shape[-2:]
    corners = [(y, x) for y in starts(height, tile, overlap) for x in starts(width, tile, overlap)]
    boxes, labels, scores, cut = [], [], [], []
    for first in range(0, len(corners), at_once):
        chosen = corners[first : first + at_once]
        for (y, x), found in zip(
            chosen, detect([image[:, y : y + tile, x : x + tile] for y, x in chosen]), strict=True
        ):
            own = found["boxes"].float() + torch.tensor([x, y, x, y])
            ends = torch.tensor([x, y, min(x + tile, width), min(y + tile, height)])
            inner = torch.tensor([x > 0, y > 0, x + tile < width, y + tile < height])
            cut.append((((own - ends).abs() < 1) & inner).any(1))
            boxes.append(own)
            labels.append(found["labels"])
            scores.append(found["scores"].float())
    numbers = torch.arange(sum(map(len, scores)))
    every = Candidates(torch.cat(boxes), torch.cat(labels), torch.cat(scores), numbers)
    kept = every.rois[~_parts(every, torch.cat(cut))]
    limit = config.detections_per_image * len(corners)
    nms = suppression(config.nms, config.nms_iou, config.soft_nms_sigma)
    (merged,) = nms.of_images(
        [Candidates(*(column[kept] for column in every))], [(height, width)], config.score_threshold, limit
    )
    return {"boxes": merged.boxes, "labels": merged.labels, "scores": merged.scores}


def _parts(every: Candidates, cut: Tensor) -> Tensor:
    """Return which (K,) of the boxes are cut and lie for the most part in one of their class that is not."""
    parts = torch.zeros_like(cut)
    whole = (~cut).nonzero().flatten()
    for index in cut.nonzero().flatten().tolist():
        box, others = every.boxes[index], every.boxes[whole[every.labels[whole] == every.labels[index]]]
        sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
        parts[index] = bool((sides.prod(1) > 0.5 * box_area(box[None])).any())
    return parts
