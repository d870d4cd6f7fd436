"""The interface of backbones and box heads, their configuration, and the parts that several of them share.

Shapes: `B` images, `R` RoIs. Feature maps have `ceil(H / stride)` rows and `ceil(W / stride)` columns on every
backbone.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Self

from torch import Tensor, nn

from detector.backbones.batch_norm import new_norm
from detector.backbones.timm_models import Levels, timm_model
from detector.errors import InputError, check_numbers
from detector.kernels.checkpointing import run_stage
from detector.kernels.parts import BACKBONE, part
from detector.parts import Part, name_of, settle
from detector.state_dicts import WeightsReport

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
    "timm",
]


class Kind(NamedTuple):
    """What is known of a network before it is built.

    Attributes:
        stages: How many stages can be frozen.
        batch_norm: Whether its pretrained layers have batch norm.
        imagenet: How many releases of ImageNet weights torchvision has for it.
        own_box_head: Whether its box head is the last layers of the classification network.
    """

    stages: int
    batch_norm: bool = True
    imagenet: int = 1
    own_box_head: bool = False


IMAGENET: Final = {"imagenet": 1, "imagenet_v1": 1, "imagenet_v2": 2}
"""Names of ImageNet weights, and which of torchvision's releases they are."""
KINDS: Final[dict[BackboneName, Kind]] = {  # of timm see `BackboneConfig.kind`
    "vgg16": Kind(5, batch_norm=False, own_box_head=True),
    "vgg16_bn": Kind(5, own_box_head=True),
    "resnet18_c4": Kind(4, own_box_head=True),
    "resnet50_c4": Kind(4, imagenet=2, own_box_head=True),
    "resnet101_c4": Kind(4, imagenet=2, own_box_head=True),
    "resnet18_fpn": Kind(5),
    "resnet50_fpn": Kind(5, imagenet=2),
    "resnet101_fpn": Kind(5, imagenet=2),
    "mobilenet_v2_c4": Kind(4, imagenet=2, own_box_head=True),
    "mobilenet_v2_fpn": Kind(5, imagenet=2),
    "mobilenet_v3_large_fpn": Kind(6, imagenet=2),
    "small_c4": Kind(4, batch_norm=False, imagenet=0),
}


class BackbonePart(Part):
    """A network of one's own under the RPN, `backbone.name`.

    Attributes:
        kind: What is known of it before it is built.
    """

    kind: Kind = Kind(0, batch_norm=False, imagenet=0)

    @abstractmethod
    def build(self, options: "BackboneConfig") -> "Backbone | tuple[Backbone, nn.Module]":
        """Return the network with random weights, such as a `FeaturePyramid` or `SingleLevel` of a `Body`.

        With it a `BoxHead` where it has its own; else the one that `backbone.box_head` names follows.
        """

    def imagenet_weights(self) -> Mapping[str, Tensor]:
        """Return the tensors that `backbone.weights imagenet` stands for, where `kind.imagenet` is 1.

        Their names are those of `Backbone.weight_prefixes`.
        """
        raise NotImplementedError


class BoxHeadPart(Part):
    """A box head of one's own, `backbone.box_head`."""

    @abstractmethod
    def build(self, in_channels: int, options: "BackboneConfig") -> nn.Module:
        """Return a `BoxHead` on top of pooled features (R, in_channels, pool_size, pool_size), randomly initialised."""


@dataclass
class BackboneConfig:
    """The network under the RPN and the box head on top of the pooled features.

    Args:
        name: Which network. `vgg16`, `vgg16_bn` (with batch norm) and `*_c4` give one feature level of stride 16 and
            use the last layers of the classification network as the box head; `*_fpn` give five levels of strides 4 to
            64 (`mobilenet_v3_large_fpn`, as torchvision builds it: three, of strides 32, 32 and 64), `small_c4` (for
            quick training from scratch) one of stride 8, each with a new box head. `timm`: the network of timm that
            `model` names, with a new box head. Or a network of one's own.
        weights: ImageNet weights as torchvision publishes them, downloaded once: `imagenet` or `imagenet_v1` (the first
            release, from which published detectors start) or `imagenet_v2` (trained longer; of resnet50, resnet101 and
            the mobilenets); for `timm`, `imagenet` is what timm publishes for that name and tag; a .pth, .pt or
            .safetensors file with torchvision's, or timm's, tensor names; or `none` for random weights. `small_c4` has
            no ImageNet weights. A caffe VGG16 in torchvision's names needs caffe's images too: image.channel_order bgr,
            image.pixel_max 255, image.mean [102.9801, 115.9465, 122.7717], image.std [1, 1, 1].
        frozen_stages: How many stages, counted from the image on, are not trained. Stages: conv1 to conv5 of vgg16;
            stem, layer1 to layer3 (FPN: layer4) of a ResNet; strides 2, 4, 8, 16 (FPN: 32) of MobileNetV2; strides 2,
            4, 8, 16, 32 and the last convolution of MobileNetV3; stem, layer1 to layer3 of `small_c4`; of `timm` one
            for each of its maps, of strides 2 (ResNet, EfficientNet) or 4 (ConvNeXt, Swin) to 32. 2 is the paper's
            choice for VGG16 and the custom for ResNets, 3 torchvision's for MobileNetV3. Must be 0 with random weights.
        norm: Norms of the pretrained layers, box head included: batch norm that is `frozen` (statistics and scale stay
            those of the weights), trained (`batch`) or trained over the images of all GPUs together (`sync`), or
            `group` norm of 32 groups (Wu and He 2018), which needs random weights, or a file of weights with it. Must
            not be `frozen` with random weights. Without effect on `vgg16`, which has none, and on `small_c4`, which
            always trains its own batch norm.
        norm_eps: Added to the variance in these norms. torchvision's published `fasterrcnn_resnet50_fpn` needs 0,
            its MobileNetV3 was trained on ImageNet with 0.001 (and detects with 0.00001). Without effect on `timm`,
            whose networks have their own.
        pool_size: Height and width of the pooled features in cells; null takes the network's own: 14 for a ResNet C4 (7
            where `box_head_stride` is 1), 7 for all others.
        box_head_stride: Stride of the first layer of the box head of `resnet*_c4` and `mobilenet_v2_c4`.
        dropout: Probability of dropping a unit after fc6 and fc7 of `vgg16` in training.
        fpn_channels: Channels of every FPN level.
        fpn_norm: After the FPN's convolutions: `none` (the paper, torchvision), or a trained one as of `norm`: `batch`
            (torchvision's `fasterrcnn_resnet50_fpn_v2`), `group` (detectron2's GN baselines) or `sync`.
        box_head: On FPN and `small_c4`: `two_fc`, two fully connected layers (the FPN paper), or `conv_fc`, four 3x3
            convolutions of `fpn_channels` with a norm and one fully connected layer (torchvision's v2), or `double`
            (Double-Head, Wu 2020): two fully connected layers for the scores, and convolutions in residual blocks, with
            a norm, for the boxes. On any network, a box head of one's own.
        box_head_scale: Of `double`, the sides of the boxes from which the convolutions' features are pooled, in units
            of the RoI's (mmdetection: 1.3).
        box_head_norm: The norm of `conv_fc` and `double`, which is trained: `batch` (torchvision's v2, Double-Head),
            `group` (detectron2) or `sync`.
        box_head_channels: Width of the fully connected layers on FPN and `small_c4`; null takes 1024 on FPN and 256 on
            `small_c4`.
        checkpoint_gradients: Keep only the input of each trained stage for the backward pass, which computes the stage
            once more: the same gradients with less memory, in a third more time.
        deformable: Deformable convolutions in the place of the 3x3 ones of a ResNet's `deformable_stages`: `none`, `v1`
            (Dai 2017) or `v2` (Zhu 2019), which begin as the plain ones. On two CPU cores resnet50_fpn then takes
            six times as long (3.6 s instead of 0.63 s, forwards and backwards, of two images of 320 x 416 pixels).
        deformable_stages: Of the stages 2 to 5 of a ResNet, which are layer1 to layer4; the papers: [3, 4, 5].
        model: For `timm`, the name that timm gives a network, such as `convnext_tiny`, also with the tag of its weights
            (`convnext_tiny.fb_in1k`). Its stages have to follow one another and take images of any size: Swin does, a
            vision transformer does not.
        levels: For `timm`, `fpn` (a level for each of its maps of stride 4 or more, and one of half the last one's
            resolution) or `single` (its map of stride 16 alone).
        drop_path: For `timm`, the share of images for which training leaves out its last residual block, falling to 0
            at its first (stochastic depth; ConvNeXt-T in detectors: 0.4).
    """

    name: BackboneName | BackbonePart = "resnet50_fpn"
    weights: str | None = "imagenet"
    frozen_stages: int = 2
    norm: Literal["frozen", "batch", "group", "sync"] = "frozen"
    norm_eps: float = 1e-5
    pool_size: int | None = None
    box_head_stride: Literal[1, 2] = 2
    dropout: float = 0.5
    fpn_channels: int = 256
    fpn_norm: Literal["none", "batch", "group", "sync"] = "none"
    box_head: Literal["two_fc", "conv_fc", "double"] | BoxHeadPart = "two_fc"
    box_head_scale: float = 1.3
    box_head_norm: Literal["batch", "group", "sync"] = "batch"
    box_head_channels: int | None = None
    checkpoint_gradients: bool = False
    deformable: Literal["none", "v1", "v2"] = "none"
    deformable_stages: list[int] = field(default_factory=lambda: [3, 4, 5])
    model: str | None = None
    levels: Levels = "fpn"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        settle("backbone", self)
        allowed = {
            "[0, 1)": "dropout drop_path",
            "[0, inf]": "norm_eps",
            "(0, inf]": "box_head_scale",
            "[1, inf]": "pool_size fpn_channels box_head_channels",
        }
        allowed |= {"[1, 256]": "pool_size", "[1, 65536]": "fpn_channels box_head_channels"}
        check_numbers("backbone", self, allowed)
        given = {"model": self.model, "levels": self.levels.replace("fpn", ""), "drop_path": self.drop_path}
        if self.name != "timm" and (key := next((key for key, value in given.items() if value), None)):
            raise InputError(f"backbone.{key} {given[key]}: is for backbone.name timm, not for {name_of(self.name)}")
        if self.kind.own_box_head and self.box_head in ("conv_fc", "double"):
            raise InputError(
                f"backbone.box_head {self.box_head}: {name_of(self.name)} has its own box head; use it with *_fpn"
            )
        if self.box_head == "double" and (self.box_head_channels or 0) % 4:
            raise InputError(f"backbone.box_head_channels: {self.box_head_channels} must be a multiple of 4 for double")
        check_frozen_stages(self.frozen_stages, self.kind.stages)
        if self.deformable != "none":
            self._check_deformable()

    def _check_deformable(self) -> None:
        key, stages = "backbone.deformable_stages", self.deformable_stages
        if not (name := name_of(self.name)).startswith("resnet"):
            raise InputError(f"backbone.deformable {self.deformable}: is for resnet*_fpn and resnet*_c4, not {name}")
        if not stages or not set(stages) <= {2, 3, 4, 5}:
            raise InputError(f"{key}: {stages} must list some of the stages 2 to 5")
        if min(stages) <= self.frozen_stages:
            raise InputError(
                f"{key} {stages}: offsets of stage {min(stages)} would stay 0 with frozen_stages {self.frozen_stages}; "
                f"give backbone.frozen_stages {min(stages) - 1} or less"
            )

    @property
    def kind(self) -> Kind:
        """Return what is known of the network before it is built."""
        if isinstance(self.name, BackbonePart):
            return self.name.kind
        if self.name != "timm":
            return KINDS[self.name]
        known = timm_model(self.model, self.levels)
        return Kind(len(known.maps), known.batch_norm, imagenet=int(known.pretrained))

    @property
    def random(self) -> bool:
        """Return whether the weights are left at random."""
        return self.weights is None or self.weights.lower() in ("none", "null", "")


class Body(nn.Module):
    """The convolutions that pretrained weights fill, in stages, named as in torchvision's classification network.

    images (B, 3, H, W), normalised -> feature maps from fine to coarse, (B, channels[i], ceil(H / strides[i]), ceil(W /
    strides[i])).
    """

    checkpoint_gradients = False

    strides: tuple[int, ...]
    channels: tuple[int, ...]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps, fine to coarse: those of the last stages, unless a network has others."""
        maps = [images]
        for stage in self.stages():
            maps = [*maps, self.run(stage, maps[-1])][-len(self.strides) :]
        return maps

    def run(self, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
        """Apply the modules of a stage, or of a part of it, one after the other."""
        return run_stage(modules, x, self.checkpoint_gradients)

    @abstractmethod
    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each stage that can be frozen, from the image on; together they are the network."""


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

    @property
    def roi_strides(self) -> tuple[int, ...]:
        """Return the strides of the levels from which RoIs are pooled: the first levels."""
        return self.strides

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Return what `forward` does; marked here, around what may be compiled."""
        with part(BACKBONE):
            return super().__call__(*args, **named)

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of all levels, each (B, channels, h, w), of images (B, 3, H, W)."""

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
        """Set the mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [module for stage in self.body.stages()[: self.frozen_stages] for module in stage]


class SingleLevel(Backbone):
    """The last map of a body as the only level, as in the paper (section 3.1)."""

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.strides = body.strides[-1:]
        self.out_channels = body.channels[-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the body's map as the only level."""
        return [self.body(images)[-1]]


def norm_layer(config: BackboneConfig) -> Callable[[int], nn.Module]:
    """Return what torchvision's constructors take as `norm_layer`."""
    return partial(new_norm, config.norm, eps=config.norm_eps)


def check_frozen_stages(count: int, stages: int) -> None:
    """Raise InputError unless 0 <= count <= stages."""
    if not 0 <= count <= stages:
        raise InputError(f"backbone.frozen_stages {count}: this backbone has {stages} stages, give 0 to {stages}")
