"""Gradient checkpointing: the same numbers with less memory, and nothing happens twice that must not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from detector.anchors import AnchorConfig
from detector.backbones import Backbone, BackboneConfig, build_backbone
from detector.backbones.base import KINDS
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig
from detector.kernels.precision import replace_layers
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig


def build(name: Any, checkpoint: bool, **options: Any) -> Backbone:
    torch.manual_seed(0)
    values = {"weights": "none", "frozen_stages": 0, "norm": "batch", "pool_size": 1} | options
    backbone, _ = build_backbone(BackboneConfig(name, **values, checkpoint_gradients=checkpoint), load_weights=False)
    replace_layers(backbone)
    return backbone


def trained(backbone: Backbone, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Feature maps, gradients, and the bytes that were kept for the backward pass, beside the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in backbone.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = backbone(images)
    loss = sum((x * torch.linspace(-1, 1, x.shape[1])[:, None, None]).sum() for x in maps)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return [x.detach() for x in maps], gradients, sum(kept.values())


@pytest.mark.parametrize("name", [name for name in KINDS if "101" not in name])
def test_same_features_gradients_and_statistics(name: str) -> None:
    """To the bit, with batch norm in training, of which a second pass would change the statistics."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    plain, checkpointed = (build(name, checkpoint) for checkpoint in (False, True))
    (maps, gradients, kept), (their_maps, their_gradients, kept_there) = (
        trained(backbone, images) for backbone in (plain, checkpointed)
    )
    assert all(torch.equal(*pair) for pair in zip(maps, their_maps, strict=True))
    assert gradients.keys() == their_gradients.keys()
    assert [key for key, gradient in gradients.items() if not torch.equal(gradient, their_gradients[key])] == []
    states = plain.state_dict(), checkpointed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [key for key, tensor in states[0].items() if not torch.equal(tensor, states[1][key])] == []
    assert {int(n) for key, n in states[1].items() if key.endswith("num_batches_tracked")} <= {1}
    assert kept_there < 0.65 * kept


@pytest.mark.parametrize("name", ["vgg16", "resnet50_fpn", "mobilenet_v2_fpn"])
def test_frozen_stages_run_once_and_others_twice(name: str) -> None:
    backbone = build(name, True, weights="imagenet", frozen_stages=2, norm="frozen").train()
    calls = [0] * len(backbone.body.stages())

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    for index, stage in enumerate(backbone.body.stages()):
        stage[0].register_forward_pre_hook(count(index))
    trained(backbone, torch.randn(1, 3, 64, 64))
    assert calls == [1, 1] + [2] * (len(calls) - 2)
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64))
    assert calls == [2, 2] + [3] * (len(calls) - 2)


def test_memory_of_a_large_image() -> None:
    """Of ResNet-50 under an FPN, as torchvision fine-tunes it: what is kept of the trained stages is their inputs."""
    options = {"weights": "imagenet", "frozen_stages": 2, "norm": "frozen"}
    images = torch.randn(1, 3, 192, 256)
    kept = [trained(build("resnet50_fpn", checkpoint, **options), images)[2] for checkpoint in (False, True)]
    assert kept[1] < 0.35 * kept[0]


def test_losses_and_gradients_under_autocast() -> None:
    image = torch.randint(256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = {
        "boxes": torch.tensor([[10.0, 5, 50, 40]]),
        "labels": torch.tensor([2]),
        "difficult": torch.tensor([False]),
    }
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        config = BackboneConfig(
            "resnet18_fpn", "imagenet", 1, fpn_channels=16, box_head_channels=16, checkpoint_gradients=checkpoint
        )
        model = FasterRCNN(
            2,
            config,
            AnchorConfig([1, 2], [0.5, 2]),
            RPNConfig(),
            RoIConfig(),
            ImageConfig([64], 96),
            load_weights=False,
        )
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.losses([image], [target])
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        found.append((losses, [p.grad for p in model.parameters() if p.grad is not None]))
    assert {name: float(loss) for name, loss in found[0][0].items()} == {
        name: float(loss) for name, loss in found[1][0].items()
    }
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))
