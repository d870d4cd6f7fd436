"""Backbones: sizes as stated, features equal to torchvision's, what is frozen stays frozen, bad options refused."""

from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any, get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detector.backbones import (
    Backbone,
    BackboneConfig,
    BoxHead,
    backbone_strides,
    build_backbone,
    check_backbone_weights,
)
from detector.backbones.base import KINDS, BackboneName
from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.backbones.fpn import FeaturePyramid
from detector.backbones.resnet import ResNetBody
from detector.errors import InputError

# name: strides, channels, stages, box head width, box head cells
EXPECTED = {
    "vgg16": ((16,), 512, 5, 4096, 7),
    "vgg16_bn": ((16,), 512, 5, 4096, 7),
    "resnet18_c4": ((16,), 256, 4, 512, 14),
    "resnet50_c4": ((16,), 1024, 4, 2048, 14),
    "resnet101_c4": ((16,), 1024, 4, 2048, 14),
    "resnet18_fpn": ((4, 8, 16, 32, 64), 256, 5, 1024, 7),
    "resnet50_fpn": ((4, 8, 16, 32, 64), 256, 5, 1024, 7),
    "resnet101_fpn": ((4, 8, 16, 32, 64), 256, 5, 1024, 7),
    "mobilenet_v2_c4": ((16,), 96, 4, 1280, 7),
    "mobilenet_v2_fpn": ((4, 8, 16, 32, 64), 256, 5, 1024, 7),
    "mobilenet_v3_large_fpn": ((32, 32, 64), 256, 6, 1024, 7),
    "small_c4": ((8,), 128, 4, 256, 7),
}


def build(name: Any, **options: Any) -> tuple[Backbone, BoxHead]:
    """With random weights, all trained, unless the options say otherwise."""
    values = {"weights": None, "frozen_stages": 0, "norm": "batch"} | options
    return build_backbone(BackboneConfig(name=name, **values), load_weights=False)


def randomise(network: nn.Module) -> nn.Module:
    """Give batch norms statistics and scales of their own, so that a swap or an omission shows."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def test_every_name_is_expected() -> None:
    assert set(get_args(BackboneName)) - {"timm"} == set(EXPECTED) == set(KINDS)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("size", [(97, 131), (64, 33)])
def test_stated_sizes_are_those_of_the_output(name: str, size: tuple[int, int]) -> None:
    strides, channels, stages, width, pool_size = EXPECTED[name]
    with torch.device("meta"):  # shapes only: VGG-16 alone would take half a gigabyte
        backbone, box_head = build(name)
        levels = backbone(torch.zeros(2, 3, *size))
        vectors = box_head(torch.zeros(3, box_head.in_channels, box_head.pool_size, box_head.pool_size))
    assert (backbone.strides, backbone.out_channels) == (strides, channels)
    assert [tuple(x.shape) for x in levels] == [(2, channels, ceil(size[0] / s), ceil(size[1] / s)) for s in strides]
    assert (box_head.in_channels, box_head.out_channels, box_head.pool_size) == (channels, width, pool_size)
    assert tuple(vectors.shape) == (3, width)
    assert len(backbone.body.stages()) == stages


@pytest.mark.parametrize(
    "name",
    ["resnet18_c4", "resnet18_fpn", "mobilenet_v2_c4", "mobilenet_v2_fpn", "mobilenet_v3_large_fpn", "small_c4"],
)
def test_stages_hold_every_parameter_once_and_in_order(name: str) -> None:
    body = build(name)[0].body
    staged = [parameter for stage in body.stages() for module in stage for parameter in module.parameters()]
    assert list(map(id, staged)) == list(map(id, body.parameters()))


@pytest.mark.parametrize("options", [{}, {"box_head_stride": 1}, {"pool_size": 5}])
@pytest.mark.parametrize("name", ["resnet18_c4", "mobilenet_v2_c4", "small_c4"])
def test_box_heads_take_any_number_of_rois(name: str, options: dict[str, Any]) -> None:
    _, box_head = build(name, **options)
    box_head.eval()
    pooled = torch.randn(3, box_head.in_channels, box_head.pool_size, box_head.pool_size)
    assert tuple(box_head(pooled[:0]).shape) == (0, box_head.out_channels)
    torch.testing.assert_close(box_head(pooled)[1:2], box_head(pooled[1:2]), atol=1e-5, rtol=1e-4)


def test_a_box_head_of_stride_1_pools_7_cells_and_gives_layer4_as_many_as_14_of_stride_2() -> None:
    _, wide = build("resnet18_c4")
    _, cheap = build("resnet18_c4", box_head_stride=1)
    assert (wide.pool_size, cheap.pool_size) == (14, 7)
    for head in (wide, cheap):
        layer4 = head.get_submodule("layer4")
        assert layer4(torch.zeros(1, 256, head.pool_size, head.pool_size)).shape[-2:] == (7, 7)


def test_vgg16_drops_units_in_training_only() -> None:
    with torch.device("meta"):
        _, box_head = build("vgg16", dropout=0.25)
    rates: list[tuple[float, bool]] = []

    def record(x: Tensor, rate: float, training: bool) -> Tensor:
        rates.append((rate, training))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.dropout", record)
        for mode in (True, False):
            box_head.train(mode)(torch.zeros(1, 512, 7, 7, device="meta"))
    assert rates == [(0.25, True)] * 2 + [(0.25, False)] * 2


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_fpn_equals_torchvision(norm: Any) -> None:
    body = ResNetBody(torchvision.models.resnet18(weights=None), depth=4).eval()
    ours = FeaturePyramid(body, 32, norm)
    norm_layer = {"none": None, "batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 32)}[norm]
    theirs = FeaturePyramidNetwork([64, 128, 256, 512], 32, LastLevelMaxPool(), norm_layer)
    names = {"lateral.": "inner_blocks.", "output.": "layer_blocks."}
    state = {}
    for key, value in ours.state_dict().items():
        for old, new in names.items():
            if key.startswith(old):
                _, index, *kind = key.split(".")
                state[f"{new}{index}.{'.'.join(kind if norm != 'none' else ['0', *kind])}"] = value
                if value.is_floating_point():
                    value.uniform_(0.5, 1.5) if value.dim() == 1 else nn.init.normal_(value)
    theirs.load_state_dict(state)
    ours.eval(), theirs.eval()
    images = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        expected = theirs({str(i): x for i, x in enumerate(body(images))})
        for mine, peer in zip(ours(images), expected.values(), strict=True):
            torch.testing.assert_close(mine, peer)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_batch_norm_equals_batch_norm_in_evaluation(
    requires_grad: bool, memory_format: torch.memory_format
) -> None:
    reference = randomise(nn.BatchNorm2d(6))
    frozen = FrozenBatchNorm2d(6)
    frozen.load_state_dict({k: v for k, v in reference.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=memory_format).requires_grad_(requires_grad)
    y = frozen.train()(x)
    torch.testing.assert_close(y, reference(x))
    assert y.is_contiguous(memory_format=memory_format)
    assert frozen(x.detach().bfloat16().requires_grad_(requires_grad)).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("name", ["resnet18_fpn", "mobilenet_v2_c4", "mobilenet_v3_large_fpn"])
def test_frozen_parts_survive_train_and_an_optimiser_step(name: str, norm: str) -> None:
    backbone, box_head = build(name, norm=norm, frozen_stages=2, weights="imagenet")
    both = randomise(nn.ModuleList([backbone, box_head])).train()
    before = {key: value.clone() for key, value in both.state_dict().items()}
    levels = backbone(torch.randn(2, 3, 64, 64))
    pooled = torch.randn(2, box_head.in_channels, box_head.pool_size, box_head.pool_size)
    (sum(x.pow(2).mean() for x in levels) + box_head(pooled).pow(2).mean()).backward()
    optimiser = torch.optim.SGD(both.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    optimiser.step()
    changed = {key for key, value in both.state_dict().items() if not torch.equal(value, before[key])}

    frozen_tensors = {
        p.data_ptr() for stage in backbone.body.stages()[:2] for m in stage for p in m.state_dict().values()
    }
    assert len(frozen_tensors) > 10
    for key, value in both.state_dict().items():
        owner = both.get_submodule(key.rpartition(".")[0])
        is_frozen = value.data_ptr() in frozen_tensors or isinstance(owner, FrozenBatchNorm2d)
        assert (key in changed) != is_frozen, key
    for key, parameter in both.named_parameters():
        in_frozen_stage = parameter.data_ptr() in frozen_tensors
        assert parameter.requires_grad != in_frozen_stage, key
        assert (parameter.grad is None) == in_frozen_stage, key
    assert any(isinstance(m, nn.BatchNorm2d) for m in both.modules()) == (norm == "batch")


def test_more_stages_frozen_leave_fewer_to_train() -> None:
    counts = []
    for stages in range(6):
        backbone, _ = build("mobilenet_v2_fpn", weights="imagenet", frozen_stages=stages)
        counts.append(sum(parameter.requires_grad for parameter in backbone.body.parameters()))
        assert [x.requires_grad for x in backbone.eval().body(torch.zeros(1, 3, 32, 32))][-1] == (stages < 5)
    assert all(more > fewer for more, fewer in pairwise(counts)) and counts[-1] == 0


def test_random_backbones_train_whole_and_on_one_image() -> None:
    backbone, box_head = build("small_c4")
    levels = backbone.train()(torch.randn(1, 3, 41, 50))
    (levels[0].pow(2).mean() + box_head(torch.randn(4, 128, 7, 7)).sum()).backward()
    parameters = [*backbone.parameters(), *box_head.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert backbone.weights_report is None


def test_memory_format_channels_last_changes_nothing() -> None:
    backbone, _ = build("resnet18_fpn")
    backbone.eval()
    images = torch.randn(1, 3, 65, 70)
    with torch.no_grad():
        expected = backbone(images)
        backbone.to(memory_format=torch.channels_last)
        for x, y in zip(backbone(images.contiguous(memory_format=torch.channels_last)), expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frozen_stages": 6}, ["frozen_stages 6", "5 stages"]),
        ({"frozen_stages": -1}, ["frozen_stages -1", "0 to 5"]),
        ({"name": "resnet18_c4", "frozen_stages": 5}, ["frozen_stages 5", "4 stages"]),
        (
            {"weights": None},
            ["frozen_stages 2", "norm frozen", "by backbone.frozen_stages 0 and backbone.norm batch"],
        ),
        ({"weights": "none", "frozen_stages": 0}, ["weights none", "norm frozen"]),
        ({"weights": None, "norm": "batch"}, ["frozen_stages 2", "by backbone.frozen_stages 0"]),
        ({"name": "vgg16", "weights": None}, ["frozen_stages 2", "by backbone.frozen_stages 0"]),
        ({"name": "small_c4"}, ["imagenet", "small_c4", "by backbone.weights none"]),
        ({"name": "resnet34_fpn"}, ["resnet34_fpn", "resnet18_fpn"]),
        ({"norm": "layer"}, ["backbone.norm: 'layer' is none of frozen, batch, group, sync"]),
        ({"norm": "group"}, ["backbone.norm group: imagenet has batch norm", "or random weights"]),
        ({"pool_size": 0}, ["backbone.pool_size: 0 must be >= 1"]),
        ({"box_head_stride": 3}, ["backbone.box_head_stride: 3 is none of 1, 2"]),
        ({"dropout": 1.0}, ["backbone.dropout: 1.0 must be in [0, 1)"]),
        ({"fpn_norm": "frozen"}, ["backbone.fpn_norm: 'frozen' is none of none, batch, group, sync"]),
        ({"box_head_norm": "none"}, ["backbone.box_head_norm: 'none' is none of batch, group, sync"]),
        ({"deformable": "v3"}, ["backbone.deformable: 'v3' is none of none, v1, v2"]),
        (
            {"deformable": "v1", "name": "vgg16"},
            ["backbone.deformable v1: is for resnet*_fpn and resnet*_c4, not vgg16"],
        ),
        (
            {"deformable": "v1", "deformable_stages": [1, 3]},
            ["deformable_stages: [1, 3] must list some of the stages 2"],
        ),
        (
            {"deformable": "v2", "frozen_stages": 3},
            ["deformable_stages [3, 4, 5]: offsets of stage 3 would stay 0", "give backbone.frozen_stages 2 or less"],
        ),
        ({"box_head": "three_fc"}, ["backbone.box_head: 'three_fc' is none of two_fc, conv_fc, double"]),
        ({"norm_eps": -1e-5}, ["backbone.norm_eps: -1e-05 must be >= 0"]),
        ({"name": "resnet50_c4", "box_head": "conv_fc"}, ["box_head conv_fc", "resnet50_c4", "*_fpn"]),
        ({"name": "vgg16_bn", "weights": None, "frozen_stages": 0}, ["weights none", "norm frozen"]),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_built(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build_backbone(BackboneConfig(**options), load_weights=False)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("options", [{"frozen_stages": 9}, {"dropout": 2.0}, {"name": "vgg17"}, {"norm": "layer"}])
def test_configurations_check_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        BackboneConfig(**options)


def test_what_is_known_of_networks_is_what_is_built() -> None:
    for name in KINDS:
        with torch.device("meta"):
            backbone, _ = build_backbone(BackboneConfig(name, weights=None, frozen_stages=0, norm="batch"))
        kind = KINDS[name]
        assert len(backbone.body.stages()) == kind.stages, name
        norms = [module for module in backbone.body.modules() if isinstance(module, nn.BatchNorm2d)]
        assert not kind.imagenet or (len(norms) > 0) == kind.batch_norm, name  # small_c4 always trains its own


@pytest.mark.parametrize("name", ["vgg16", "small_c4"])
def test_networks_without_batch_norm_ignore_norm(name: Any) -> None:
    check_backbone_weights(BackboneConfig(name=name, weights=None, frozen_stages=0, norm="frozen"))


def test_strides_without_building() -> None:
    assert {name: backbone_strides(name) for name in KINDS} == {
        name: strides for name, (strides, *_) in EXPECTED.items()
    }
