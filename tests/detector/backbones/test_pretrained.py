"""Pretrained weights: torchvision's tensors land where they belong, and what does not fit is said in one line."""

import copy
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from detector.backbones import Backbone, BackboneConfig, BoxHead, build_backbone, check_backbone_weights
from detector.backbones.base import KINDS
from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.backbones.box_heads import TwoLayerHead
from detector.backbones.pretrained import read_weights_file
from detector.errors import InputError
from detector.state_dicts import WeightsReport

# Backbones whose box head is part of the classification network too.
FULL_BOX_HEADS = {"vgg16": "vgg16", "resnet50_c4": "resnet50", "mobilenet_v2_c4": "mobilenet_v2"}


def randomise(network: nn.Module) -> nn.Module:
    """Give batch norms statistics and scales of their own, so that a swap or an omission shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()


def load(name: Any, weights: str | Path, **options: Any) -> tuple[Backbone, BoxHead, WeightsReport]:
    backbone, box_head = build_backbone(BackboneConfig(name=name, weights=str(weights), **options))
    assert backbone.weights_report is not None
    return backbone.eval(), box_head.eval(), backbone.weights_report


@pytest.fixture(scope="module")
def resnet18() -> torchvision.models.ResNet:
    network = randomise(torchvision.models.resnet18(weights=None))
    assert isinstance(network, torchvision.models.ResNet)
    return network


@pytest.fixture(scope="module")
def mobilenet() -> torchvision.models.MobileNetV2:
    network = randomise(torchvision.models.mobilenet_v2(weights=None))
    assert isinstance(network, torchvision.models.MobileNetV2)
    return network


@pytest.fixture(scope="module")
def resnet18_file(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def mobilenet_file(mobilenet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mobilenet.safetensors"
    save_file(mobilenet.state_dict(), path)
    return path


def resnet_maps(network: torchvision.models.ResNet, images: Tensor) -> list[Tensor]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    maps = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
        maps.append(x)
    return maps


@torch.no_grad()
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_resnet_features_equal_torchvision(resnet18: torchvision.models.ResNet, resnet18_file: Path, norm: str) -> None:
    backbone, box_head, report = load("resnet18_c4", resnet18_file, norm=norm)
    assert (report.loaded, report.missing, report.unexpected) == (100, [], ["fc.weight", "fc.bias"])
    # In float64: a folded norm rounds differently, and the comparison is to be exact.
    images = torch.randn(1, 3, 97, 131, dtype=torch.float64)
    maps = resnet_maps(copy.deepcopy(resnet18).double(), images)
    torch.testing.assert_close(backbone.double()(images)[0], maps[2])
    torch.testing.assert_close(box_head.double()(maps[2]), maps[3].mean(dim=(2, 3)))

    fpn, _, report = load("resnet18_fpn", resnet18_file, norm=norm)
    assert (report.loaded, report.missing) == (100, [])
    for ours, theirs in zip(fpn.double().body(images), maps, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_mobilenet_features_equal_torchvision(mobilenet: torchvision.models.MobileNetV2, mobilenet_file: Path) -> None:
    backbone, box_head, report = load("mobilenet_v2_c4", mobilenet_file)
    assert (report.loaded, report.missing) == (260, [])
    assert set(report.unexpected) == {"classifier.1.weight", "classifier.1.bias"}
    images = torch.randn(1, 3, 97, 131, dtype=torch.float64)
    features = copy.deepcopy(mobilenet).double().features
    stride16 = features[:14](images)
    torch.testing.assert_close(backbone.double()(images)[0], stride16)
    torch.testing.assert_close(box_head.double()(stride16), features(images).mean(dim=(2, 3)))

    fpn, _, report = load("mobilenet_v2_fpn", mobilenet_file)
    assert (report.loaded, report.missing) == (260, [])
    for ours, end in zip(fpn.double().body(images), (4, 7, 14, 19), strict=True):
        torch.testing.assert_close(ours, features[:end](images))


@pytest.mark.parametrize(("name", "family"), FULL_BOX_HEADS.items())
def test_imagenet_fills_every_tensor(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(weights: Any, progress: bool, check_hash: bool) -> dict[str, Tensor]:
        asked.append((str(weights), check_hash))
        return dict(torchvision.models.get_model(family, weights=None).state_dict())

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fetch)
    with torch.device("meta"):
        _, _, report = load(name, "imagenet")
    expected = {
        "vgg16": ("VGG16_Weights.IMAGENET1K_V1", 26 + 4, ["classifier.6.weight", "classifier.6.bias"]),
        "resnet50": ("ResNet50_Weights.IMAGENET1K_V1", 53 + 53 * 4, ["fc.weight", "fc.bias"]),
        "mobilenet_v2": (
            "MobileNet_V2_Weights.IMAGENET1K_V1",
            52 + 52 * 4,
            ["classifier.1.weight", "classifier.1.bias"],
        ),
    }[family]
    assert asked == [(expected[0], True)]
    assert (report.loaded, report.missing, report.unexpected) == (expected[1], [], expected[2])
    assert f"{expected[1]} of {expected[1]} tensors loaded" in report.summary()
    assert expected[0] in report.summary() and expected[2][0] in report.summary()


@torch.no_grad()
@pytest.mark.parametrize("norm_eps", [1e-5, 0.01])
def test_mobilenet_v3_features_equal_torchvision(norm_eps: float, tmp_path: Path) -> None:
    """Its last two stages, as torchvision's detector takes them; the epsilon is an option."""
    network = randomise(
        torchvision.models.mobilenet_v3_large(weights=None, norm_layer=partial(nn.BatchNorm2d, eps=norm_eps))
    )
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    fpn, _, report = load("mobilenet_v3_large_fpn", tmp_path / "weights.safetensors", norm_eps=norm_eps)
    assert report.missing == [] and all(name.startswith("classifier.") for name in report.unexpected)
    images = torch.randn(1, 3, 65, 99, dtype=torch.float64)
    features = network.double().get_submodule("features")
    assert isinstance(features, nn.Sequential)
    for ours, end in zip(fpn.double().body(images), (14, 17), strict=True):
        torch.testing.assert_close(ours, features[:end](images))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_vgg16_bn_features_equal_torchvision(norm: str, tmp_path: Path) -> None:
    vgg = torchvision.models.vgg
    features = randomise(vgg.make_layers(vgg.cfgs["D"], batch_norm=True))
    save_file(nn.ModuleDict({"features": features}).state_dict(), tmp_path / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:  # fc6 and fc7 are vgg16's, and large
        patch.setattr("detector.backbones.vgg16.VGG16Head", lambda *_: TwoLayerHead(1, 512, 1))
        backbone, _, report = load("vgg16_bn", tmp_path / "weights.safetensors", norm=norm)
    assert (report.loaded, report.missing, report.unexpected) == (13 * 2 + 13 * 4, [], [])
    images = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    assert isinstance(features, nn.Sequential)
    torch.testing.assert_close(backbone.double()(images)[0], features.double()[:-1](images))


@torch.no_grad()
def test_vgg16_features_and_fully_connected_layers_equal_torchvision(tmp_path: Path) -> None:
    """On one pooled cell: fc6 on 7 x 7 would take 400 MB."""
    vgg = torchvision.models.vgg
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    classifier = nn.Sequential(
        nn.Linear(512, 4096), nn.ReLU(), nn.Identity(), nn.Linear(4096, 4096), nn.ReLU(), nn.Identity()
    )
    path = tmp_path / "vgg16.safetensors"
    save_file(nn.ModuleDict({"features": features, "classifier": classifier}).state_dict(), path)
    backbone, box_head, report = load("vgg16", path, pool_size=1)
    assert (report.loaded, report.missing, report.unexpected) == (30, [], [])
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(backbone(images)[0], features[:-1](images))
    pooled = torch.randn(3, 512, 1, 1)
    torch.testing.assert_close(box_head(pooled), classifier(pooled.flatten(1)))


def test_without_loading_neither_file_nor_network_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("touched")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", refuse)
    for weights in ("imagenet", "absent.pth"):
        backbone, _ = build_backbone(BackboneConfig(name="mobilenet_v2_c4", weights=weights), load_weights=False)
        assert backbone.weights_report is None
        assert any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())
        assert not next(backbone.parameters()).requires_grad


@pytest.mark.parametrize("error", [URLError("no route"), OSError("disk full"), RuntimeError("invalid hash value")])
def test_a_failed_download_names_address_and_folder(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as caught:
        load("mobilenet_v2_c4", "imagenet")
    for word in (
        "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
        f"{tmp_path / 'checkpoints'} as mobilenet_v2-b0353104.pth",
        "pass the file by backbone.weights",
        "cannot download",
    ):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_file_in_the_download_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    broken = tmp_path / "checkpoints" / "mobilenet_v2-b0353104.pth"
    broken.write_bytes(b"half a download")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name in ("imagenet", "imagenet_v1"):
        with pytest.raises(InputError, match=f"weights {name}: .* is damaged, its SHA-256 is not that") as caught:
            load("mobilenet_v2_c4", name)
        assert str(broken) in str(caught.value)


def test_releases_of_imagenet_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(weights: Any, **_: Any) -> dict[str, Tensor]:
        asked.append(str(weights))
        return dict(torchvision.models.get_model(str(weights).split("_W")[0].lower(), weights=None).state_dict())

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fetch)
    with torch.device("meta"):
        for name in ("imagenet", "imagenet_v1", "imagenet_v2"):
            load("resnet50_fpn", name)
    assert asked == [f"ResNet50_Weights.IMAGENET1K_V{number}" for number in (1, 1, 2)]


def test_torchvision_has_the_releases_that_are_offered() -> None:
    for name, kind in KINDS.items():
        if kind.imagenet:
            weights = torchvision.models.get_model_weights(name.removesuffix("_c4").removesuffix("_fpn"))
            releases = [release for release in (1, 2) if f"IMAGENET1K_V{release}" in weights.__members__]
            assert len(releases) == kind.imagenet, name


@pytest.mark.parametrize(
    ("name", "weights", "instead"),
    [
        ("vgg16", "imagenet_v2", "give backbone.weights imagenet, or give a file"),
        ("resnet18_fpn", "imagenet_v2", "give backbone.weights imagenet"),
        ("small_c4", "imagenet_v1", "train it from scratch by backbone.weights none"),
    ],
)
def test_releases_that_there_are_not(name: str, weights: str, instead: str) -> None:
    with pytest.raises(InputError, match=f"^backbone.weights {weights}: none exist for {name}; {instead}"):
        check_backbone_weights(BackboneConfig(name=name, weights=weights))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_missing_and_corrupt_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(InputError, match=r"^backbone\.weights .*no such file") as caught:
        load("mobilenet_v2_c4", path)
    assert str(path) in str(caught.value)
    for content in (b"", b"not weights at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable weights file") as caught:
            load("mobilenet_v2_c4", path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"must end in \.pth, \.pt or \.safetensors, not '\.onnx'"):
        read_weights_file(tmp_path / "weights.onnx")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        read_weights_file(tmp_path / "epoch.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")  # a whole pickled module is code, and is not run
    with pytest.raises(InputError, match="not a readable weights file"):
        read_weights_file(tmp_path / "module.pt")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_inside_a_checkpoint_is_found(key: str, tmp_path: Path) -> None:
    torch.save({key: {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert list(read_weights_file(tmp_path / "checkpoint.pth")) == ["a"]


def test_weights_of_another_network_are_refused(resnet18_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tensor of .* fits") as caught:
        load("mobilenet_v2_c4", resnet18_file)
    assert "'bn1.bias'" in str(caught.value) and "'features.0.0.weight'" in str(caught.value)
    with pytest.raises(InputError) as caught, torch.device("meta"):
        load("resnet50_c4", resnet18_file)
    assert "'layer1.0.conv1.weight' has shape (64, 64, 3, 3)" in str(caught.value)
    assert "needs (64, 64, 1, 1)" in str(caught.value)


def test_tensors_that_would_be_frozen_at_random_must_be_there(resnet18: nn.Module, tmp_path: Path) -> None:
    state = {k: v for k, v in resnet18.state_dict().items() if "num_batches_tracked" not in k}
    path = tmp_path / "part.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith("layer4.")}, path)
    with pytest.raises(InputError, match="lacks 20 tensors that would be frozen") as caught:  # batch norms of layer4
        load("resnet18_c4", path)
    assert "'layer4.0.bn1.weight'" in str(caught.value)
    report = load("resnet18_c4", path, norm="batch")[2]
    assert report.loaded == 75 and len(report.missing) == 25 and report.missing[0] == "layer4.0.conv1.weight"
    assert "75 of 100 tensors loaded; missing: layer4.0.conv1.weight, " in report.summary()
    assert " and 19 more; unexpected: fc." in report.summary()

    save_file({k: v for k, v in state.items() if not k.startswith("conv1.")}, path)
    with pytest.raises(
        InputError, match=r"lacks 1 tensors that would be frozen at random values, first 'conv1\.weight'"
    ):
        load("resnet18_c4", path, norm="batch", frozen_stages=1)


def test_half_precision_files_fill_float32_tensors(mobilenet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in mobilenet.state_dict().items()}, path)
    backbone, _, _ = load("mobilenet_v2_c4", path)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_a_small_backbone_takes_its_own_tensors(tmp_path: Path) -> None:
    trained, _ = build_backbone(BackboneConfig(name="small_c4", weights=None, frozen_stages=0))
    save_file(trained.body.state_dict(), tmp_path / "small.safetensors")
    backbone, _, report = load("small_c4", tmp_path / "small.safetensors", frozen_stages=1)
    assert report.missing == report.unexpected == []
    for key, value in backbone.body.state_dict().items():
        torch.testing.assert_close(value, trained.body.state_dict()[key], rtol=0, atol=0)
