"""The networks of the four steps: modes, gradients, losses, and what is evaluated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detector.backbones.base import BackboneConfig
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import make_batch
from detector.training import alternating
from detector.training.alternating import AlternatingConfig, AlternatingTraining
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL, target

FPN = BackboneConfig("resnet18_fpn", weights=None, frozen_stages=0, norm="batch", fpn_channels=16, box_head_channels=32)
RPN_LOSSES, ROI_LOSSES = {"loss_rpn_cls", "loss_rpn_reg"}, {"loss_roi_cls", "loss_roi_reg"}


def detector(backbone: BackboneConfig = SMALL) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(2, backbone, **OPTIONS)


def scheme_at(step: int, model: FasterRCNN | None = None, **options: Any) -> AlternatingTraining:
    scheme = AlternatingTraining(model or detector(), AlternatingConfig(**options))
    scheme.restore({"alternating": {"step": step, "ends": []}})
    return scheme


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_fixed_backbones_stay_in_evaluation_mode(step):
    module = FasterRCNNModule(["cat", "dog"], SMALL, **OPTIONS, training_scheme="alternating")
    assert module.alternating is not None
    module.alternating.restore({"alternating": {"step": step, "ends": []}})
    for _ in range(2):
        module.train()
        norms = [m for m in module.model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [norm.training for norm in norms] == [step == 2] * len(norms)
        assert module.model.rpn.training  # as many proposals as training takes
        if module.alternating.proposer is not None:
            assert module.alternating.proposer.backbone.training == (step == 1)
            assert module.alternating.proposer.rpn.training
        module.eval()
        assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_frozen_stages_stay_frozen(step):
    model = detector()
    model.backbone.freeze(2)
    scheme = scheme_at(step, model)
    for network in (model, scheme.proposer):
        for name, parameter in network.named_parameters() if network is not None else ():
            if name.startswith(("backbone.body.stem", "backbone.body.layer1")):
                assert not parameter.requires_grad
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == [set(), {"backbone", "roi_heads"}, {"rpn"}, {"roi_heads"}][
        step - 1
    ]
    scheme.train()
    assert not model.backbone.body.stem.training  # type: ignore[union-attr]


@pytest.mark.parametrize("backbone", [SMALL, FPN], ids=["one level", "FPN"])
@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_every_trained_parameter_gets_a_gradient_and_no_other(step, objects, backbone):
    """Whatever the level of the RoIs, and without any object: processes exchange gradients of all of them."""
    scheme = scheme_at(step, detector(backbone))
    images, targets = BATCH
    losses = scheme.losses(images, targets if objects else [target([]), target([])])
    assert losses.keys() == (RPN_LOSSES if step in (1, 3) else ROI_LOSSES) | {"loss"}
    losses["loss"].backward()
    for network in (scheme.model, scheme.proposer):
        for name, parameter in network.named_parameters() if network is not None else ():
            assert (parameter.grad is not None) == parameter.requires_grad, name
    assert sum(parameter.requires_grad for parameter in [*scheme.model.parameters(), *scheme.parameters()]) > 0


def test_losses_are_those_of_joint_training():
    """On one network and the same samples, the two halves of joint training's losses."""
    model = detector()
    model.rpn.config.reg_weight, model.roi_heads.config.reg_weight = 3.0, 2.0
    model.rpn.config.samples_per_image = model.roi_heads.config.samples_per_image = 10_000  # all: nothing is random
    model.rpn.config.positive_fraction = model.roi_heads.config.positive_fraction = 1.0
    model.backbone.eval()  # as in steps 3 and 4
    joint = {name: loss.detach() for name, loss in model.losses(*BATCH).items()}
    rpn, roi = (
        {name: loss.detach() for name, loss in scheme_at(step, model).losses(*BATCH).items()} for step in (3, 4)
    )
    for name, value in (rpn | roi).items():
        if name != "loss":
            torch.testing.assert_close(value, joint[name])
    assert float(rpn["loss"]) == pytest.approx(float(rpn["loss_rpn_cls"] + 3 * rpn["loss_rpn_reg"]), rel=1e-6)
    assert float(roi["loss"]) == pytest.approx(float(roi["loss_roi_cls"] + 2 * roi["loss_roi_reg"]), rel=1e-6)
    assert float(joint["loss"]) == pytest.approx(float(rpn["loss"] + roi["loss"]), rel=1e-6)


def test_step_2_trains_on_the_proposals_of_the_first_network():
    """A detector's own RPN that proposes nothing usable makes no difference, the proposer's does."""

    def losses(change: Callable[[AlternatingTraining], Any]) -> dict[str, Tensor]:
        scheme = scheme_at(2)
        with torch.no_grad():
            change(scheme)
        torch.manual_seed(1)
        return scheme.losses(*BATCH)

    def shift(scheme: AlternatingTraining) -> None:
        assert scheme.proposer is not None
        scheme.proposer.rpn.head.deltas.bias += 0.3

    plain = losses(lambda scheme: None)
    own = losses(lambda scheme: scheme.model.rpn.head.deltas.bias.add_(0.3))
    assert all(torch.equal(plain[name], own[name]) for name in plain)
    assert not torch.equal(plain["loss_roi_cls"], losses(shift)["loss_roi_cls"])


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_evaluation_is_of_the_networks_that_there_are(step):
    scheme = scheme_at(step).eval()
    model = scheme.model.eval()
    with torch.no_grad():
        if scheme.proposer is not None:
            scheme.proposer.rpn.head.deltas.bias += 0.3  # so that the two propose differently
        detections, proposals = scheme.detect(BATCH[0])
        own, own_proposals = model(BATCH[0])
    assert torch.equal(proposals[0], own_proposals[0]) == (step > 2)
    assert len(proposals[0]) > 5
    if step == 1:
        assert [len(d["boxes"]) for d in detections] == [0, 0]
        assert detections[0]["boxes"].shape == (0, 4)
        assert detections[0]["labels"].dtype == torch.int64
    elif step == 2:
        assert scheme.proposer is not None
        batch = make_batch(BATCH[0], model.image_config, training=False)
        output = scheme.proposer.rpn(scheme.proposer.backbone(batch.tensors))
        given = scheme.proposer.rpn.proposals(output, batch)
        expected = model.detect(model.backbone(batch.tensors), given, batch)
        assert torch.equal(detections[0]["boxes"], expected[0]["boxes"])
        assert not torch.equal(detections[0]["boxes"], own[0]["boxes"])
    else:
        assert torch.equal(detections[0]["boxes"], own[0]["boxes"])
        assert torch.equal(detections[0]["scores"], own[0]["scores"])


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_drawn_scale_resizes_the_image(step, monkeypatch):
    """`multiscale` does in alternating training what it does in joint training: 64 x 96 by 0.5 is 32 x 48."""
    sizes = []
    make = alternating.make_batch
    monkeypatch.setattr(alternating, "make_batch", lambda *arguments: sizes.append(make(*arguments)) or sizes[-1])
    images, targets = BATCH
    scheme_at(step).train().losses(images, [targets[0] | {"scale": 0.5}, targets[1]])
    assert [batch.sizes for batch in sizes] == [[(32, 48), (64, 96)]]
