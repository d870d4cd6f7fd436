"""Norms of other kinds: group norm of the right groups, synchronised batch norm where there is one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from detector.backbones import BackboneConfig, build_backbone
from detector.backbones.batch_norm import new_norm
from detector.errors import InputError

FROM_SCRATCH: dict[str, Any] = {"weights": None, "frozen_stages": 0}


def test_group_norm_by_hand() -> None:
    """Of 64 channels 32 groups of two, of 24 eight of three; each has mean 0 and variance 1 in each image by itself."""
    assert [new_norm("group", channels).num_groups for channels in (64, 24)] == [32, 8]
    x = torch.zeros(2, 64, 1, 2)
    x[0, 62], x[0, 63] = torch.tensor([[1.0, 3]]), torch.tensor([[5.0, 7]])  # mean 4, variance (9 + 1 + 1 + 9) / 4
    found = new_norm("group", 64, eps=0.0001)(x)
    torch.testing.assert_close(found[0, 62:].flatten(), torch.tensor([-3.0, -1, 1, 3]) / 5.0001**0.5)
    assert not found[1].any() and not found[0, :62].any()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("resnet18_fpn", "group"), ("mobilenet_v2_fpn", "group"), ("resnet18_fpn", "sync"), ("resnet18_c4", "sync")],
)
def test_all_norms_of_a_network_are_of_the_kind(name: Any, kind: Any) -> None:
    options: dict[str, Any] = {"norm": kind, **FROM_SCRATCH}
    if name.endswith("fpn"):
        options |= {"fpn_norm": kind, "box_head": "conv_fc", "box_head_norm": kind}
    network = nn.ModuleList(build_backbone(BackboneConfig(name, **options)))
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    norms = [module for module in network.modules() if isinstance(module, kinds)]
    assert {type(norm) for norm in norms} == {nn.GroupNorm if kind == "group" else nn.SyncBatchNorm}
    others = nn.ModuleList(
        build_backbone(
            BackboneConfig(name, **{key: "batch" if value == kind else value for key, value in options.items()})
        )
    )
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in others.modules())
    if kind == "sync":  # of one process the same as batch norm, and the same names
        others.load_state_dict(network.state_dict())
        images = torch.randn(2, 3, 64, 96)
        for mine, theirs in zip(network.train()[0](images), others.train()[0](images), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_box_head_with_group_norm_equals_torchvision() -> None:
    config = BackboneConfig(fpn_channels=64, box_head="conv_fc", box_head_norm="group", box_head_channels=16)
    with torch.device("cpu"):
        _, ours = build_backbone(config, load_weights=False)
    theirs = FastRCNNConvFCHead((64, 7, 7), [64] * 4, [16], partial(nn.GroupNorm, 32))
    for tensor in ours.state_dict().values():
        tensor.normal_()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    pooled = torch.randn(3, 64, 7, 7)
    torch.testing.assert_close(ours(pooled), theirs(pooled))


def test_several_processes_on_cpus_are_told_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = new_norm("sync", 4)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(InputError, match=r"norm.* sync: needs a GPU for each process; give batch$"):
        norm(torch.zeros(2, 4, 3, 3))
    norm.eval()(torch.zeros(2, 4, 3, 3))  # there is nothing to share


def test_weights_with_batch_norm_do_not_go_into_group_norm(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "batch.pth")
    of_groups = torchvision.models.resnet18(weights=None, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    torch.save(of_groups.state_dict(), tmp_path / "group.pth")
    config = partial(BackboneConfig, "resnet18_fpn", norm="group", frozen_stages=2)
    with pytest.raises(InputError, match=r"batch\.pth: has batch norm, and backbone\.norm is group; give frozen"):
        build_backbone(config(str(tmp_path / "batch.pth")))
    backbone, _ = build_backbone(config(str(tmp_path / "group.pth")))
    assert backbone.weights_report is not None and not backbone.weights_report.missing
    torch.testing.assert_close(backbone.body.layer4[1].conv2.weight, of_groups.layer4[1].conv2.weight)


def test_networks_of_timm() -> None:
    pytest.importorskip("timm")
    options = {"model": "resnet18", **FROM_SCRATCH}
    with pytest.raises(InputError, match=r"backbone\.norm group: timm's networks keep theirs; give .* batch or sync"):
        build_backbone(BackboneConfig("timm", norm="group", **options))
    sync, _ = build_backbone(BackboneConfig("timm", norm="sync", **options))
    batch, _ = build_backbone(BackboneConfig("timm", norm="batch", **options))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in sync.modules()) == 20
    batch.load_state_dict(sync.state_dict())
    images = torch.randn(2, 3, 64, 96)
    for mine, theirs in zip(sync.train()(images), batch.train()(images), strict=True):
        torch.testing.assert_close(mine, theirs)
