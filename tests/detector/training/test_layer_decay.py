"""Learning rates that fall from stage to stage of a body, towards the image."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from detector.backbones import BackboneConfig, build_backbone
from detector.errors import InputError
from detector.training.optimization import OptimizerConfig, parameter_groups, say_lr


def rates(backbone: nn.Module, head: nn.Module, **options: Any) -> dict[str, float]:
    config = OptimizerConfig(lr=0.1, layer_decay=0.5, **options)
    groups = parameter_groups(nn.ModuleList([backbone, head]), [head], config)
    tensors = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(p) for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad]
    assert sorted(tensors) == sorted(trained)  # each once
    return {group["name"]: group["lr"] for group in groups}


def test_resnet() -> None:
    """Of the stem and four layers the first two are frozen; the pyramid has the whole rate, new layers ten times it."""
    config = BackboneConfig("resnet18_fpn", frozen_stages=2, norm="batch")
    backbone, _ = build_backbone(config, load_weights=False)
    assert rates(backbone, nn.Linear(2, 3), new_layer_lr_factor=10.0, bias_lr_factor=2.0) == pytest.approx(
        {
            "pretrained_weights": 0.1,
            "pretrained_biases": 0.2,
            "stage3_weights": 0.1 / 8,
            "stage3_biases": 0.2 / 8,
            "stage4_weights": 0.1 / 4,
            "stage4_biases": 0.2 / 4,
            "stage5_weights": 0.1 / 2,
            "stage5_biases": 0.2 / 2,
            "new_weights": 1.0,
            "new_biases": 2.0,
        }
    )
    (group,) = (
        group
        for group in parameter_groups(backbone, [], OptimizerConfig(layer_decay=0.5))
        if group["name"] == "stage4_weights"
    )
    of_layer3 = {id(p) for name, p in backbone.body.layer3.named_parameters() if name.endswith("weight")}
    assert {id(parameter) for parameter in group["params"]} == of_layer3


def test_convnext_of_timm() -> None:
    pytest.importorskip("timm")
    config = BackboneConfig("timm", weights="none", frozen_stages=0, model="convnext_atto")
    backbone, _ = build_backbone(config)
    found = rates(backbone, nn.Linear(2, 3))
    expected = {f"stage{stage}": 0.1 * 0.5 ** (5 - stage) for stage in (1, 2, 3, 4)} | {"pretrained": 0.1, "new": 0.1}
    assert found == pytest.approx(
        {f"{name}_{kind}": rate for name, rate in expected.items() for kind in ("weights", "biases")}
    )


def test_without_decay_groups_are_the_four() -> None:
    backbone, _ = build_backbone(BackboneConfig("resnet18_fpn"), load_weights=False)
    names = [group["name"] for group in parameter_groups(backbone, [], OptimizerConfig())]
    assert names == ["pretrained_weights", "pretrained_biases"]
    with pytest.raises(InputError, match=r"optimizer\.layer_decay: 1\.5 must be in \(0, 1\]"):
        OptimizerConfig(layer_decay=1.5)


def test_rates_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("detector.training.optimization.rank_zero_info", said.append)
    backbone, _ = build_backbone(BackboneConfig("resnet18_fpn", frozen_stages=4), load_weights=False)
    config = OptimizerConfig(lr=0.1, layer_decay=0.7)
    optimizer = torch.optim.SGD(parameter_groups(backbone, [], config))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.01)
    say_lr(config, SimpleNamespace(optimizers=[optimizer]))  # type: ignore[arg-type]
    assert said == [
        "optimizer.layer_decay 0.7: learning rates pretrained_weights 0.1, pretrained_biases 0.1, stage5_weights 0.07"
    ]
    say_lr(OptimizerConfig(), SimpleNamespace(optimizers=[optimizer]))  # type: ignore[arg-type]
    assert len(said) == 1
