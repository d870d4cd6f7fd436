"""What every backbone and box head promises, their configuration, and the parts that several of them share.

Shapes: `B` images, `R` RoIs. Feature maps have `ceil(H / stride)` rows and `ceil(W / stride)` columns on every
backbone.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn

from detector.backbones.checkpointing import run_stage
from detector.backbones.onednn import linear_relu
from detector.errors import InputError
from detector.weights import WeightsReport

BackboneName = Literal[
    "vgg16",
    "vgg16_bn",
    "resnet18_c4",
    "resnet50_c4",
    "resnet101_c4",
    "resnet18_fpn",
    "resnet50_fpn",
    "resnet101_fpn",
    "mobilenet_v2_c4",
    "mobilenet_v2_fpn",
    "mobilenet_v3_large_fpn",
    "small_c4",
]


@dataclass
class BackboneConfig:
    """The network under the RPN and the box head on top of the pooled features.

    Args:
        name: Which network. `vgg16`, `vgg16_bn` (with batch norm) and `*_c4` give one feature level of stride 16 and
            use the last layers of the classification network as the box head; `*_fpn` give five levels of strides 4 to
            64 (`mobilenet_v3_large_fpn`, as torchvision builds it: three, of strides 32, 32 and 64), `small_c4` (for
            quick training from scratch) one of stride 8, each with a new box head.
        weights: `imagenet` (torchvision's first ImageNet release, downloaded once), a .pth, .pt or .safetensors file
            with torchvision's tensor names, or `none` for random weights. `small_c4` has no ImageNet weights. A caffe
            VGG16 in torchvision's names needs caffe's images too: image.channel_order bgr, image.pixel_max 255,
            image.mean [102.9801, 115.9465, 122.7717], image.std [1, 1, 1].
        frozen_stages: How many stages, counted from the image on, are not trained. Stages: conv1 to conv5 of vgg16;
            stem, layer1 to layer3 (FPN: layer4) of a ResNet; strides 2, 4, 8, 16 (FPN: 32) of MobileNetV2; strides 2,
            4, 8, 16, 32 and the last convolution of MobileNetV3; stem, layer1 to layer3 of `small_c4`. 2 is the paper's
            choice for VGG16 and the custom for ResNets, 3 torchvision's for MobileNetV3. Must be 0 with random weights.
        norm: Batch norm of the pretrained layers, box head included: `frozen` (statistics and scale stay those of the
            weights) or `batch` (trained). Must be `batch` with random weights. Without effect on `vgg16`, which has
            none, and on `small_c4`, which always trains its own.
        norm_eps: Added to the variance in these batch norms. torchvision's published `fasterrcnn_resnet50_fpn` needs 0,
            its MobileNetV3 was trained on ImageNet with 0.001 (and detects with 0.00001).
        pool_size: Height and width of the pooled features in cells; null takes the network's own: 14 for a ResNet C4 (7
            where `box_head_stride` is 1), 7 for all others.
        box_head_stride: Stride of the first layer of the box head of `resnet*_c4` and `mobilenet_v2_c4`.
        dropout: Probability of dropping a unit after fc6 and fc7 of `vgg16` in training.
        fpn_channels: Channels of every FPN level.
        fpn_norm: After the FPN's convolutions: `none` (the paper, torchvision) or `batch`, which is trained
            (torchvision's `fasterrcnn_resnet50_fpn_v2`).
        box_head: On FPN and `small_c4`: `two_fc`, two fully connected layers (the FPN paper), or `conv_fc`, four 3x3
            convolutions of `fpn_channels` with batch norm, which is trained, and one fully connected layer
            (torchvision's v2).
        box_head_channels: Width of the fully connected layers on FPN and `small_c4`; null takes 1024 on FPN and 256 on
            `small_c4`.
        checkpoint_gradients: Keep only the input of each trained stage for the backward pass, which computes the stage
            once more: the same gradients with less memory, in a third more time.
    """

    name: BackboneName = "resnet50_fpn"
    weights: str | None = "imagenet"
    frozen_stages: int = 2
    norm: Literal["frozen", "batch"] = "frozen"
    norm_eps: float = 1e-5
    pool_size: int | None = None
    box_head_stride: Literal[1, 2] = 2
    dropout: float = 0.5
    fpn_channels: int = 256
    fpn_norm: Literal["none", "batch"] = "none"
    box_head: Literal["two_fc", "conv_fc"] = "two_fc"
    box_head_channels: int | None = None
    checkpoint_gradients: bool = False

    @property
    def random(self) -> bool:
        """Whether the weights are left at random."""
        return self.weights is None or self.weights.lower() in ("none", "null", "")


_MOST_DEVIATIONS = 64


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: buffers, the same in training and evaluation.

    (B, C, H, W) -> (B, C, H, W). Tensor names are those of `nn.BatchNorm2d`, so its weights load.

    Attributes:
        folded: The convolution before it applies it (see `folding`); inputs are passed on.
        float32: That convolution computes in float32 under autocast, too (see `Backbone.settle_precision`).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.folded = False
        self.float32 = False
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.folded:
            return x
        scale, shift = self.scale_and_shift()
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as x * scale + shift, each (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def is_ill_conditioned(self) -> bool:
        """Whether a channel's mean is so many standard deviations from 0 that bfloat16, whose numbers are up to 1/128
        apart, leaves little of what varies."""
        deviations = self.running_mean.abs() * (self.running_var + self.eps).rsqrt()
        return not deviations.is_meta and bool((deviations > _MOST_DEVIATIONS).any())

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class Body(nn.Module):
    """The convolutions that pretrained weights fill, in stages, named as in torchvision's classification network.

    images (B, 3, H, W), normalised -> feature maps from fine to coarse, (B, channels[i], ceil(H / strides[i]), ceil(W /
    strides[i])).

    Attributes:
        checkpoint_gradients: As of `BackboneConfig`.
    """

    checkpoint_gradients = False

    strides: tuple[int, ...]
    channels: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]: ...

    def run(self, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
        """The modules of a stage, or of a part of it, one after the other."""
        return run_stage(modules, x, self.checkpoint_gradients)

    @abstractmethod
    def stages(self) -> list[list[nn.Module]]:
        """The modules of each stage that can be frozen, from the image on; together they hold every parameter."""


class Backbone(nn.Module):
    """images (B, 3, H, W), normalised -> one map per level, fine to coarse.

    Each is (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Attributes:
        strides: Image pixels per cell, one number per level.
        out_channels: Channels, the same on all levels.
        frozen_stages: How many stages `freeze` has frozen.
        weight_prefixes: Prefix of a tensor's name in a weights file -> its prefix here; other tensors have no
            pretrained value.
        weights_report: What the pretrained weights filled; None for random weights or where none were read.
    """

    strides: tuple[int, ...]
    out_channels: int

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.frozen_stages = 0
        self.weight_prefixes = {"": "body."}
        self.weights_report: WeightsReport | None = None
        self.register_load_state_dict_post_hook(_settle_precision)

    @property
    def roi_strides(self) -> tuple[int, ...]:
        """Strides of the levels from which RoIs are pooled: the first levels."""
        return self.strides

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]: ...

    def settle_precision(self) -> None:
        """Choose the convolutions that run in float32 under autocast: all up to the last ill-conditioned frozen norm,
        which magnifies their errors as well as its own.

        For weights that were written into the tensors; `load_state_dict` calls it. The pretrained MobileNetV2 has one
        such norm, the fourth, with 1,556 standard deviations; its others have at most 8.
        """
        norms = [module for module in self.body.modules() if isinstance(module, FrozenBatchNorm2d)]
        last = max((place for place, norm in enumerate(norms) if norm.is_ill_conditioned()), default=-1)
        for place, norm in enumerate(norms):
            norm.float32 = place <= last

    def freeze(self, count: int) -> Self:
        """Freeze the first `count` stages: no gradients, and evaluation mode even after `.train()`.

        Raises InputError where there are not so many stages.
        """
        check_frozen_stages(count, len(self.body.stages()))
        self.frozen_stages = count
        for module in self._frozen():
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [module for stage in self.body.stages()[: self.frozen_stages] for module in stage]


def _settle_precision(backbone: nn.Module, _: object) -> None:
    assert isinstance(backbone, Backbone)
    backbone.settle_precision()


class SingleLevel(Backbone):
    """The last map of a body as the only level, as in the paper (section 3.1)."""

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.strides = body.strides[-1:]
        self.out_channels = body.channels[-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.body(images)[-1]]


class BoxHead(nn.Module):
    """pooled (R, in_channels, pool_size, pool_size) -> (R, out_channels); R may be 0.

    Attributes:
        pool_size: Height and width of the pooled features in cells.
        in_channels: Channels of the backbone's levels.
        out_channels: Width of the vector from which classes and boxes are predicted.
        weight_prefixes: As on `Backbone`; empty where no pretrained weights exist for the head.
    """

    def __init__(self, pool_size: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.weight_prefixes: dict[str, str] = {}

    @abstractmethod
    def forward(self, pooled: Tensor) -> Tensor: ...


class TwoLayerHead(BoxHead):
    """Two fully connected layers with ReLU, randomly initialised (the box head of the FPN paper, section 5.2)."""

    def __init__(self, pool_size: int, in_channels: int, out_channels: int) -> None:
        super().__init__(pool_size, in_channels, out_channels)
        self.fc1 = nn.Linear(in_channels * pool_size**2, out_channels)
        self.fc2 = nn.Linear(out_channels, out_channels)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return linear_relu(self.fc2, linear_relu(self.fc1, pooled.flatten(1)))


class ConvFCHead(BoxHead):
    """Four 3 x 3 convolutions with batch norm and ReLU, then a fully connected layer with ReLU; randomly initialised.

    The box head of "Benchmarking Detection Transfer Learning with Vision Transformers" (Li et al. 2021), in
    torchvision's `fasterrcnn_resnet50_fpn_v2`.
    """

    def __init__(self, pool_size: int, in_channels: int, out_channels: int, convolutions: int = 4) -> None:
        super().__init__(pool_size, in_channels, out_channels)
        self.convs = nn.Sequential()
        for _ in range(convolutions):
            convolution = nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            self.convs.append(nn.Sequential(convolution, nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)))
        self.fc = nn.Linear(in_channels * pool_size**2, out_channels)
        nn.init.kaiming_uniform_(self.fc.weight, a=1)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return linear_relu(self.fc, self.convs(pooled).flatten(1))


BOX_HEADS = {"two_fc": TwoLayerHead, "conv_fc": ConvFCHead}


def new_box_head(config: BackboneConfig, in_channels: int, width: int = 1024) -> BoxHead:
    """The box head that `config.box_head` names, of its `box_head_channels` or else `width` outputs."""
    return BOX_HEADS[config.box_head](config.pool_size or 7, in_channels, config.box_head_channels or width)


def norm_layer(config: BackboneConfig) -> Callable[[int], nn.Module]:
    """What torchvision's constructors take as `norm_layer`."""
    return partial(FrozenBatchNorm2d if config.norm == "frozen" else nn.BatchNorm2d, eps=config.norm_eps)


def check_frozen_stages(count: int, stages: int) -> None:
    """Raises InputError unless 0 <= count <= stages."""
    if not 0 <= count <= stages:
        raise InputError(
            f"--model.backbone.frozen_stages {count}: this backbone has {stages} stages, give 0 to {stages}"
        )
