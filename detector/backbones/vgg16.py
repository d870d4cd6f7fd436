"""VGG-16 as in the paper (section 3.1): 13 convolutions of stride 16, and fc6, fc7 as the box head.

Batch norm may follow each convolution.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones.base import BackboneConfig, Body, SingleLevel, norm_layer
from detector.backbones.box_heads import BoxHead

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


class VGG16Body(Body):
    """conv1_1 to conv5_3 with the last max-pool dropped.

    Max-pooling rounds sizes up as in Caffe, on which the paper's numbers were made; torchvision's rounds down. The two
    agree on sizes that are multiples of 16.

    Args:
        norm: Makes the batch norm after each convolution, as in torchvision's `vgg16_bn`; None: no batch norm.
    """

    strides = (16,)
    channels = (512,)

    def __init__(self, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self._ends: list[int] = []  # of the blocks, in layers: indices must stay torchvision's for the tensor names
        channels_in = 3
        for place, (channels, convolutions) in enumerate(_BLOCKS):
            for _ in range(convolutions):
                norms = [norm(channels)] if norm else []
                layers += [nn.Conv2d(channels_in, channels, 3, padding=1), *norms, nn.ReLU(inplace=True)]
                channels_in = channels
            if place + 1 < len(_BLOCKS):
                layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            self._ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each stage; see `Body.stages`."""
        layers = list(self.features)
        return [layers[start:end] for start, end in zip([0, *self._ends], self._ends, strict=False)]


class VGG16Head(BoxHead):
    """fc6 and fc7 of the classification network, each with ReLU and dropout; 7 x 7 cells fit the pretrained fc6."""

    def __init__(self, pool_size: int, dropout: float) -> None:
        super().__init__(pool_size, in_channels=512, out_channels=4096)
        self.fc6 = nn.Linear(512 * pool_size**2, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.dropout = dropout
        self.weight_prefixes = {"classifier.0.": "fc6.", "classifier.3.": "fc7."}
        for layer in (self.fc6, self.fc7):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return a vector per RoI, (R, out_channels)."""
        x = pooled.flatten(1)
        for layer in (self.fc6, self.fc7):
            x = F.dropout(F.relu(layer(x)), self.dropout, self.training)
        return x


def build_vgg16(config: BackboneConfig) -> tuple[SingleLevel, VGG16Head]:
    """Build `vgg16` or `vgg16_bn` with random weights."""
    body = VGG16Body(norm_layer(config) if config.name == "vgg16_bn" else None)
    return SingleLevel(body), VGG16Head(config.pool_size or 7, config.dropout)
