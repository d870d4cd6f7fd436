"""Networks of timm: the same maps as timm's own, sizes as stated, a step and a detection, refusals in one line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detector.backbones import BackboneConfig, backbone_strides, build_backbone, check_backbone_weights
from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.backbones.timm_models import timm_model
from detector.errors import InputError
from detector.kernels.onednn import Conv2d
from detector.kernels.precision import replace_layers
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.small_detector import BATCH, OPTIONS

timm = pytest.importorskip("timm", reason="timm is not installed: pip install '.[timm]'")

SWIN = "swin_tiny_patch4_window7_224"
# model: channels, stages
NETWORKS = {
    "test_resnet": ((32, 48, 192, 96), 5),
    "test_convnext": ((24, 32, 48, 64), 4),
    SWIN: ((96, 192, 384, 768), 4),
    "test_efficientnet": ((24, 32, 48, 64), 5),
}


def config(model: str | None, **options: Any) -> BackboneConfig:
    values = {"weights": None, "frozen_stages": 0, "norm": "batch", "fpn_channels": 16, "box_head_channels": 32}
    return BackboneConfig(name="timm", model=model, **(values | options))


@pytest.fixture(scope="module", params=NETWORKS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    """A model's name, timm's own feature network, and a file of the weights of the whole model."""
    whole = timm.create_model(request.param)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that a swap or an omission shows
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(whole.state_dict(), path)
    options: dict[str, Any] = {"strict_img_size": False} if request.param == SWIN else {}
    options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    theirs = timm.create_model(request.param, features_only=True, **options)
    return request.param, theirs.eval(), path


def test_maps_are_those_of_timm_with_weights_from_a_file(saved: tuple[str, nn.Module, Path]) -> None:
    model, theirs, path = saved
    channels, stages = NETWORKS[model]
    backbone, _ = build_backbone(config(model, weights=str(path), frozen_stages=2, norm="frozen"))
    report = backbone.weights_report
    assert report is not None and report.missing == []
    assert {name.split(".")[0] for name in report.unexpected} <= {
        "head",
        "norm",
        "fc",
        "classifier",
        "conv_head",
        "bn2",
    }
    assert "image.mean [0." in report.remark
    assert backbone.strides == backbone_strides("timm", model) == (4, 8, 16, 32, 64)
    assert backbone.body.channels == channels and len(backbone.body.stages()) == stages
    replace_layers(backbone)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = [x.permute(0, 3, 1, 2) if model == SWIN else x for x in theirs(images)[-4:]]
        found = backbone.eval().body(images)
    for ours, x in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))
    frozen = [
        parameter for stage in backbone.body.stages()[:2] for module in stage for parameter in module.parameters()
    ]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.body.modules())


@pytest.mark.parametrize("model", NETWORKS)
def test_a_step_changes_every_trained_tensor_and_a_detection_has_boxes_in_the_image(model: str) -> None:
    torch.manual_seed(0)
    module = FasterRCNNModule(["thing"], backbone=config(model), **OPTIONS)
    losses = module.model.losses(*BATCH)
    losses["loss"].backward()
    without = [name for name, parameter in module.model.backbone.named_parameters() if parameter.grad is None]
    assert without == [] and bool(losses["loss"].isfinite())
    detections = module.eval()([BATCH[0][0]])[0]
    boxes = detections["boxes"]
    assert len(boxes) and bool((boxes >= 0).all() & (boxes <= torch.tensor([96, 64, 96, 64])).all())


@pytest.mark.parametrize("size", [(97, 131), (64, 33)])
def test_stated_sizes_are_those_of_the_output(size: tuple[int, int]) -> None:
    """ConvNeXt alone would round sizes down."""
    with torch.device("meta"):
        for levels, strides in (("fpn", (4, 8, 16, 32, 64)), ("single", (16,))):
            for model in ("test_convnext", "test_efficientnet", "mobilenetv4_conv_small", "vgg11"):
                backbone, box_head = build_backbone(config(model, levels=levels))
                maps = backbone(torch.zeros(2, 3, *size))
                assert backbone.strides == strides and box_head.in_channels == backbone.out_channels
                assert [x.shape[-2:] for x in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in strides]


@pytest.mark.parametrize(("model", "channels"), [("test_efficientnet", 48), ("test_resnet", 192)])
def test_a_single_level_ends_with_the_map_of_stride_16(model: str, channels: int) -> None:
    backbone, _ = build_backbone(config(model, levels="single"))
    staged = [parameter for stage in backbone.body.stages() for module in stage for parameter in module.parameters()]
    assert backbone.out_channels == channels
    assert list(map(id, staged)) == list(map(id, backbone.body.parameters()))


def test_frozen_norms_of_residual_blocks_are_folded_and_their_activations_stay() -> None:
    backbone, _ = build_backbone(config("test_efficientnet", weights="file", norm="frozen"), load_weights=False)
    replace_layers(backbone)
    norms = [module for module in backbone.body.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) > 5 and all(norm.folded for norm in norms)
    assert sum(bool(conv.norm) for conv in backbone.modules() if isinstance(conv, Conv2d)) == len(norms)


def test_a_norm_before_its_convolution_is_not_folded() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = FrozenBatchNorm2d(3)
            self.conv = nn.Conv2d(3, 3, 1)

    block = Block()
    replace_layers(block)
    assert not block.bn.folded


@pytest.mark.parametrize(
    ("model", "options", "parts"),
    [
        ("convnxt_tiny", {}, ["backbone.model convnxt_tiny", "convnext_tiny"]),
        (None, {}, ["backbone.model null", "timm.list_models()"]),
        ("convnext_tiny.foo", {}, ["convnext_tiny.foo", "fb_in1k"]),
        ("maxvit_tiny_tf_224", {}, ["images of (224, 224) pixels alone", "swin_tiny"]),
        ("inception_v3", {}, ["inception_v3", "not [(64, 48, 80)"]),
        ("test_convnext", {"frozen_stages": 5}, ["backbone.frozen_stages 5", "4 stages"]),
        ("vit_tiny_patch16_224", {}, ["stage by stage", "any size"]),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(model: Any, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        config(model, **options)
    text = str(error.value)
    assert "\n" not in text and [part for part in parts if part not in text] == []


def test_options_of_timm_are_refused_elsewhere() -> None:
    for options in ({"model": "convnext_tiny"}, {"levels": "single"}, {"drop_path": 0.1}):
        with pytest.raises(InputError, match=r"is for backbone\.name timm, not for resnet50_fpn"):
            BackboneConfig(**options)  # type: ignore[arg-type]


def test_residual_blocks_are_left_out_in_training_alone() -> None:
    torch.manual_seed(0)
    backbone, _ = build_backbone(config("test_convnext", drop_path=0.4))
    plain, _ = build_backbone(config("test_convnext"))
    shares = [module.drop_prob for module in backbone.modules() if isinstance(module, timm.layers.DropPath)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == pytest.approx(0.4)
    images = torch.randn(2, 3, 64, 96)
    for parameter in (p for name, p in backbone.named_parameters() if name.endswith("gamma")):
        parameter.data.fill_(1.0)
    trained = [backbone.train().body(images)[-1] for _ in range(4)]
    assert any(not torch.allclose(trained[0], one) for one in trained)
    for parameter, same in zip(plain.parameters(), backbone.parameters(), strict=True):
        parameter.data.copy_(same)
    torch.testing.assert_close(backbone.eval().body(images), plain.train().body(images))
    with pytest.raises(InputError, match=r"backbone\.drop_path 0\.1: vgg11 has none; give 0"):
        build_backbone(config("vgg11", drop_path=0.1))


def test_random_weights_are_not_frozen_and_only_one_release_is_known() -> None:
    with pytest.raises(InputError, match="norm frozen"):
        check_backbone_weights(config("test_resnet", norm="frozen"))
    check_backbone_weights(config("test_convnext", norm="frozen"))  # has no batch norm
    with pytest.raises(InputError, match=r"none exist for test_resnet; give backbone\.weights imagenet"):
        check_backbone_weights(config("test_resnet", weights="imagenet_v2"))


def test_a_download_that_fails_names_the_address_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*args: Any, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no network\nat all")
        return make(*args, **options)

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(InputError) as error:
        build_backbone(config("test_convnext", weights="imagenet"))
    address = "https://huggingface.co/timm/test_convnext.r160_in1k/resolve/main/model.safetensors"
    assert "(no network); download" in str(error.value)
    assert f"download {address} elsewhere and pass the file by backbone.weights" in str(error.value)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = FasterRCNNModule(["thing"], backbone=config("test_convnext"), **OPTIONS)
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    content["pytorch-lightning_version"] = "2.6.6"
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["backbone"]["model"] == "test_convnext"
    again = FasterRCNNModule.from_checkpoint(path)
    for (name, ours), (other, theirs) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    timm_model.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'faster-rcnn-lightning\[timm\]'"):
        FasterRCNNModule.from_checkpoint(path)


def test_maps_are_those_that_timm_takes_by_default_also_where_these_do_not_begin_with_the_first() -> None:
    with torch.device("meta"):
        backbone, _ = build_backbone(config("csatv2"))
        maps = backbone.body(torch.zeros(1, 3, 128, 192))
    assert backbone.body.strides == (8, 16, 32, 64)
    assert [tuple(x.shape[1:]) for x in maps] == [(32, 16, 24), (72, 8, 12), (168, 4, 6), (386, 2, 3)]
