"""Parts of one's own: as text and back, what is refused, and that networks ask them."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detector.anchors import AnchorConfig, AnchorGenerator, AnchorShapes
from detector.assignment import Around, IoUMatcher, Matcher
from detector.backbones.base import BackboneConfig, BackbonePart
from detector.errors import InputError
from detector.losses import BoxLoss, ClassLoss, SmoothL1
from detector.parts import Part, chosen, name_of, options_of, own_parts
from detector.post_processing import HardNMS, SoftNMS, suppression
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.sampling import IGNORED, NEGATIVE, POSITIVE, GroundTruth, Matches
from detector.training.optimization import OptimizerConfig, Schedule, lr_factor

HERE = __name__


@dataclass
class Scaled(BoxLoss):
    factor: float = 2.0
    inner: BoxLoss = field(default_factory=lambda: SmoothL1(1.0))

    def __call__(self, pred_deltas: Tensor, deltas: Tensor, decode: Any) -> Tensor:
        return self.factor * self.inner(pred_deltas, deltas, decode)


class Forgetful(BoxLoss):
    def __init__(self, factor: float = 1.0) -> None:
        self.scale = factor

    def __call__(self, pred_deltas: Tensor, deltas: Tensor, decode: Any) -> Tensor:
        return pred_deltas - deltas


class Unfinished(BoxLoss):
    pass


class Nearest(Matcher):
    def __call__(self, candidates: Tensor, objects: Tensor, around: Around) -> Matches:
        """Give object i the candidate i; the others are background."""
        kind = torch.full((len(candidates),), NEGATIVE)
        kind[: len(objects)] = POSITIVE
        index = torch.arange(len(candidates)).clamp(max=max(len(objects) - 1, 0))
        return Matches(kind, index, torch.zeros(len(candidates)))


@dataclass
class Doubling(AnchorShapes):
    side: float = 8.0

    def __call__(self, level: int) -> Tensor:
        half = self.side * 2**level / 2
        return torch.tensor([[-half, -half, half, half], [-2 * half, -half, 2 * half, half]][: 2 - level])


class Falling(Schedule):
    needs_length = False

    def __call__(self, progress: float, step: int) -> float:
        return 1 / (1 + step)


def test_text_and_back() -> None:
    config = RoIConfig(reg_loss=Scaled(3.0, Scaled(4.0)))
    text = options_of(config)
    inner = {"class_path": "detector.losses.SmoothL1", "init_args": {"beta": 1.0}}
    within = {"class_path": f"{HERE}.Scaled", "init_args": {"factor": 4.0, "inner": inner}}
    assert text["reg_loss"] == {"class_path": f"{HERE}.Scaled", "init_args": {"factor": 3.0, "inner": within}}
    assert RoIConfig(**text) == config
    assert text["nms"] == "hard"
    assert own_parts(roi=config, rpn=RPNConfig()) == {"roi.reg_loss": f"{HERE}.Scaled"}
    assert name_of("giou") == "giou"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "not_there.Loss",
            "roi.reg_loss not_there.Loss: No module named 'not_there' .looked for in the",
        ),
        (f"{HERE}.Nothing", "has no attribute 'Nothing'"),
        (f"{HERE}.Nearest", "is not a class that inherits from detector.losses.BoxLoss"),
        (f"{HERE}.Unfinished", "has all its methods"),
        ({"class_path": f"{HERE}.Scaled", "init_args": {"factr": 1}}, "unexpected keyword argument 'factr'"),
        (
            {"class_path": f"{HERE}.Scaled", "init_args": {"inner": {"class_path": "a.B"}}},
            r"reg_loss\.inner a\.B: No mod",
        ),
        ("gou", "'gou' is none of smooth_l1, iou, giou, diou, ciou"),
        (3, "3 is none of smooth_l1"),
    ],
)
def test_what_is_refused(text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        RoIConfig(reg_loss=text)
    assert str(error.value).startswith("roi.reg_loss") and "\n" not in str(error.value)


def test_arguments_are_to_be_kept() -> None:
    with pytest.raises(InputError, match=re.escape(f"{HERE}.Forgetful: must keep its argument factor as self.factor")):
        options_of(RoIConfig(reg_loss=Forgetful()))


def test_a_module_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_part.py").write_text("import torch\nfrom nowhere_at_all import x\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"rpn\.matcher failing_part\.M: No module named 'nowhere_at_all'"):
        RPNConfig(matcher="failing_part.M")  # type: ignore[arg-type]
    sys.modules.pop("failing_part", None)


def test_each_network_has_its_own() -> None:
    given = Scaled()
    assert chosen(given, {}) == given and chosen(given, {}) is not given
    assert chosen("a", {"a": lambda: given}) is given


def test_short_names_are_classes() -> None:
    assert suppression("hard", 0.3, 0.5) == HardNMS(0.3)
    assert suppression("soft_linear", 0.3, 0.5) == SoftNMS(0.3)
    assert isinstance(RPNConfig(cls_loss="focal", focal_gamma=3.0).objectness_loss(), Part)
    with pytest.raises(TypeError):
        ClassLoss()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("treatment", "kinds", "index"),
    [
        ("keep", [POSITIVE, POSITIVE, NEGATIVE, NEGATIVE], [0, 1]),
        ("drop", [POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE], [1]),  # the object that is not difficult, by its own number
        ("ignore", [POSITIVE, NEGATIVE, NEGATIVE, IGNORED], [1]),  # the last one lies on the difficult one
    ],
)
def test_difficult_objects_are_kept_from_matchers(treatment: str, kinds: list[int], index: list[int]) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    truth = GroundTruth(boxes, torch.tensor([1, 2]), torch.tensor([True, False]))
    candidates = torch.tensor([[50.0, 50, 60, 60], [70, 70, 80, 80], [0, 0, 10, 4], [0, 0, 10, 9]])
    (found,) = Nearest().of_images([candidates], [truth], treatment, [Around([4])])
    assert found.kind.tolist() == kinds
    assert found.index[found.kind == POSITIVE].tolist() == index
    none = GroundTruth(boxes[:1], torch.tensor([1]), torch.tensor([True]))
    (found,) = Nearest().of_images([candidates], [none], "drop", [Around([4])])
    assert found.kind.tolist() == [NEGATIVE] * 4


@pytest.mark.parametrize("treatment", ["keep", "drop", "ignore"])
def test_matching_by_iou_treats_difficult_objects_as_the_base_class_does(treatment: str) -> None:
    torch.manual_seed(0)
    corners = torch.rand(60, 2) * 40
    candidates = torch.cat((corners, corners + 5 + torch.rand(60, 2) * 30), dim=1)
    truth = GroundTruth(candidates[:6] + 2, torch.ones(6).long(), torch.arange(6) % 3 == 0)
    matcher, around = IoUMatcher(0.5, (0.0, 0.5)), [Around([60])]
    (ours,) = matcher.of_images([candidates], [truth], treatment, around)
    (usual,) = Matcher.of_images(matcher, [candidates], [truth], treatment, around)
    assert ours.kind.equal(usual.kind) and (ours.kind == POSITIVE).sum() > 3
    assert ours.index[ours.kind == POSITIVE].equal(usual.index[usual.kind == POSITIVE])


def test_anchors_of_ones_own_per_level() -> None:
    config = AnchorConfig(generator=Doubling(4.0))
    made = AnchorGenerator(config, (8, 16))
    assert made.anchors_per_location == (2, 1)
    first, second = made([(1, 2), (1, 1)], torch.device("cpu"))
    assert first.tolist() == [[2, 2, 6, 6], [0, 2, 8, 6], [10, 2, 14, 6], [8, 2, 16, 6]]
    assert second.tolist() == [[4, 4, 12, 12]]
    assert config.names_of_level(0) == ["4x4", "8x4"] and config.shapes_of_level(0)[1][1] == 0.5
    with pytest.raises(InputError, match=r"anchors.generator .*Doubling: must give boxes \(A, 4\)"):
        AnchorGenerator(AnchorConfig(generator=Doubling(-4.0)), (8,))


def test_a_schedule_of_ones_own_after_the_warm_up() -> None:
    factor = lr_factor(OptimizerConfig(schedule=Falling(), warmup_steps=2, warmup_start=0.5), float("inf"))
    assert [factor(step) for step in range(4)] == pytest.approx([0.5, 0.75 / 2, 1 / 3, 1 / 4])


def test_a_backbone_of_another_class_is_refused() -> None:
    class Wrong(BackbonePart):
        def build(self, options: BackboneConfig) -> Any:
            return torch.nn.Identity()

    from detector.backbones import build_backbone

    config = BackboneConfig(Wrong(), "none", frozen_stages=0, norm="batch")
    with pytest.raises(InputError, match=r"backbone.name .*Wrong: build must give a Backbone"):
        build_backbone(config)
    with pytest.raises(InputError, match=r"backbone.frozen_stages 2: this backbone has 0 stages"):
        BackboneConfig(Wrong())
