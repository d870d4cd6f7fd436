"""Online hard example mining: RoIs are chosen by their loss (Shrivastava et al., CVPR 2016, section 4)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.ops import nms


def hardest(boxes: Tensor, losses: Tensor, nms_iou: float, number: int) -> Tensor:
    """Ascending indices (at most `number`,) of the RoIs (R, 4) with the highest losses (R,).

    Of RoIs that overlap by more than `nms_iou` only the hardest is taken: they lie on the same cells, and their losses
    would count twice.
    """
    return nms(boxes, losses, nms_iou)[:number].sort().values


@contextmanager
def read_only(*networks: nn.Module) -> Iterator[None]:
    """Networks in evaluation mode: without dropout, and without a trace in batch norm's statistics.

    Autocast's cache of weights is off meanwhile: a copy made without gradients must not serve the training pass.
    """
    training = [module for network in networks for module in network.modules() if module.training]
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        for module in training:
            module.training = True
