"""Joint training, and that alternating training takes nothing of it but the detector."""

from typing import Any

import pytest
import torch

from detector.faster_rcnn import FasterRCNN
from detector.training.alternating import AlternatingTraining
from detector.training.joint import JointTraining
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_alternating_training_answers_all_that_a_scheme_is_asked_itself() -> None:
    """It derives from joint training: what it left out would be joint training's, without a word."""
    assert public(JointTraining) - public(AlternatingTraining) == {"model"}


def test_joint_training_is_the_detector_alone() -> None:
    torch.manual_seed(0)
    model = FasterRCNN(2, SMALL, **OPTIONS)
    scheme, state = JointTraining(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (scheme.name, scheme.detects, scheme.is_final, scheme.logged()) == ("joint", True, True, {})
    torch.manual_seed(1)
    ours = scheme.losses(*BATCH)
    model.load_state_dict(state)  # the statistics of batch norm have changed
    torch.manual_seed(1)
    theirs = model.losses(*BATCH)
    assert ours.keys() == {"loss_rpn_cls", "loss_rpn_reg", "loss_roi_cls", "loss_roi_reg", "loss"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    checkpoint: dict[str, Any] = {}
    scheme.save(checkpoint)
    assert checkpoint == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("name", "kind"), [("joint", JointTraining), ("alternating", AlternatingTraining)])
def test_the_option_chooses_the_scheme(name: Any, kind: type) -> None:
    module = FasterRCNNModule(["cat", "dog"], SMALL, **OPTIONS, training_scheme=name)
    assert type(module.scheme) is kind
    assert module.scheme.name == name
    assert module.scheme.model is module.model
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == ({"alternating": {"step": 1, "ends": []}} if name == "alternating" else {})
    networks = {key.split(".")[0] for key in module.state_dict()}
    assert networks == ({"model", "alternating"} if name == "alternating" else {"model"})
