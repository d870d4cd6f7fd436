"""Box heads for backbones whose classification network leaves none (FPN, `small_c4`), and the layers behind any."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation

from detector.backbones.base import BackboneConfig, BoxHeadPart
from detector.backbones.batch_norm import Norm, new_norm
from detector.errors import InputError
from detector.kernels.layout import for_convolutions
from detector.parts import name_of


class BoxHead(nn.Module):
    """pooled (R, in_channels, pool_size, pool_size) -> (R, out_channels); R may be 0.

    A head may give (R, 2 * out_channels): features for the class scores, then others for the boxes.

    Attributes:
        scales: Sides of the boxes that are pooled, in units of the RoI's. Where there are several, the features of one
            follow those of the other as channels: (R, in_channels * len(scales), pool_size, pool_size).
        weight_prefixes: As on `Backbone`; empty where no pretrained weights exist for the head.
    """

    scales: tuple[float, ...] = (1.0,)

    def __init__(self, pool_size: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.weight_prefixes: dict[str, str] = {}

    @abstractmethod
    def forward(self, pooled: Tensor) -> Tensor:
        """Return a vector per RoI."""


def _initialize(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)


class TwoLayerHead(BoxHead):
    """Two fully connected layers with ReLU, randomly initialised (the box head of the FPN paper, section 5.2)."""

    def __init__(self, pool_size: int, in_channels: int, out_channels: int) -> None:
        super().__init__(pool_size, in_channels, out_channels)
        self.fc1 = nn.Linear(in_channels * pool_size**2, out_channels)
        self.fc2 = nn.Linear(out_channels, out_channels)
        _initialize(self.fc1, self.fc2)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return a vector per RoI, (R, out_channels)."""
        return F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))


class ConvFCHead(BoxHead):
    """Four 3 x 3 convolutions with a norm and ReLU, then a fully connected layer with ReLU; randomly initialised.

    The box head of "Benchmarking Detection Transfer Learning with Vision Transformers" (Li et al. 2021), in
    torchvision's `fasterrcnn_resnet50_fpn_v2`.
    """

    def __init__(
        self, pool_size: int, in_channels: int, out_channels: int, convolutions: int = 4, norm: Norm = "batch"
    ) -> None:
        super().__init__(pool_size, in_channels, out_channels)
        self.convs = nn.Sequential()
        for _ in range(convolutions):
            layers = Conv2dNormActivation(in_channels, in_channels, 3, norm_layer=partial(new_norm, norm))
            nn.init.kaiming_normal_(layers[0].weight, mode="fan_out", nonlinearity="relu")
            self.convs.append(layers)
        self.fc = nn.Linear(in_channels * pool_size**2, out_channels)
        _initialize(self.fc)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return a vector per RoI, (R, out_channels)."""
        return F.relu(self.fc(self.convs(for_convolutions(pooled)).flatten(1)))


class DoubleHead(BoxHead):
    """Two fully connected layers for the class scores, and convolutions for the boxes; randomly initialised.

    Double-Head R-CNN (Wu et al., CVPR 2020; arXiv 1904.06493): a residual block that widens, four bottlenecks, and the
    mean over cells. All convolutions have a norm, which is trained. The result is (R, 2 * out_channels).
    """

    def __init__(
        self, pool_size: int, in_channels: int, out_channels: int, scale: float = 1.0, norm: Norm = "batch"
    ) -> None:
        super().__init__(pool_size, in_channels, out_channels)
        self.scales = (1.0,) if scale == 1 else (1.0, scale)
        self.fc1 = nn.Linear(in_channels * pool_size**2, out_channels)
        self.fc2 = nn.Linear(out_channels, out_channels)
        _initialize(self.fc1, self.fc2)
        layers = partial(Conv2dNormActivation, in_channels, norm_layer=partial(new_norm, norm))
        last = {"kernel_size": 1, "activation_layer": None}
        self.widen = nn.Sequential(layers(in_channels, 3), layers(out_channels, **last))
        self.shortcut = layers(out_channels, **last)
        block = partial(Bottleneck, out_channels, out_channels // 4, norm_layer=partial(new_norm, norm))
        self.blocks = nn.Sequential(*(block() for _ in range(4)))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pooled: Tensor) -> Tensor:
        """Return two vectors per RoI, one after the other: for its scores, and for its boxes."""
        of_scores, of_boxes = pooled[:, : self.in_channels], pooled[:, -self.in_channels :]
        vector = F.relu(self.fc2(F.relu(self.fc1(of_scores.flatten(1)))))
        x = for_convolutions(of_boxes)
        x = self.blocks(F.relu(self.widen(x) + self.shortcut(x)))
        return torch.cat((vector, x.mean(dim=(2, 3))), dim=1)


def new_box_head(config: BackboneConfig, in_channels: int, width: int = 1024) -> BoxHead:
    """Build the box head that `config.box_head` names, of its `box_head_channels` or else `width` outputs.

    Raises:
        InputError: One's own is no `BoxHead`.
    """
    if isinstance(config.box_head, BoxHeadPart):
        head = config.box_head.build(in_channels, config)
        if not isinstance(head, BoxHead):
            raise InputError(
                f"backbone.box_head {name_of(config.box_head)}: build gives a {type(head).__name__}, no BoxHead"
            )
        return head
    heads: dict[str, Callable[[int, int, int], BoxHead]] = {
        "two_fc": TwoLayerHead,
        "conv_fc": partial(ConvFCHead, norm=config.box_head_norm),
        "double": partial(DoubleHead, scale=config.box_head_scale, norm=config.box_head_norm),
    }
    return heads[config.box_head](config.pool_size or 7, in_channels, config.box_head_channels or width)


class BoxPredictor(nn.Module):
    """Linear layers for class scores (R, C + 1) and deltas (R, C * 4), or (R, 4) if class-agnostic.

    `score_std` and `delta_std` are the standard deviations of their initial weights.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        class_agnostic: bool,
        score_std: float = 0.01,
        delta_std: float = 1e-3,
    ) -> None:
        super().__init__()
        self.scores = nn.Linear(in_features, num_classes + 1)
        self.deltas = nn.Linear(in_features, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.scores.weight, std=score_std)
        nn.init.normal_(self.deltas.weight, std=delta_std)
        nn.init.zeros_(self.scores.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits and deltas in float32, under autocast too, of RoI features (R, in_features).

        Of features (R, 2 * in_features) the first half is for the logits, the other for the deltas.
        bfloat16 tells few scores apart, which costs ranks, and it saves no time in layers as small as these.
        """
        with torch.autocast(x.device.type, enabled=False):
            of_scores, of_boxes = x.chunk(2, dim=1) if x.shape[1] > self.scores.in_features else (x, x)
            return self.scores(of_scores.float()), self.deltas(of_boxes.float())
