"""The order in memory and the type in which convolutions take features."""

import torch
from torch import Tensor


def for_convolutions(x: Tensor) -> Tensor:
    """Return features (R, channels, h, w) as a GPU's convolutions take them: channels last, of autocast's type.

    RoI pooling gives float32, channels first. Each convolution that these go into would bring them into its own form:
    in ResNet's C4 head two, forwards and backwards, each time over 400 MB for 512 RoIs.
    """
    if x.device.type != "cuda":
        return x
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return x.to(dtype, memory_format=torch.channels_last)
