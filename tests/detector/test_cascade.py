"""Cascade R-CNN: stages against a transcription of the paper, and in a whole detector."""

from contextlib import closing
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.ops import batched_nms, roi_align

from detector.anchors import AnchorConfig
from detector.assignment import Around, DynamicMatcher, Matcher
from detector.backbones.base import BackboneConfig
from detector.backbones.box_heads import TwoLayerHead
from detector.boxes import BoxCoder
from detector.cascade import CascadeRoIHeads
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageBatch, ImageConfig
from detector.roi_heads import RoIConfig, RoIHeads
from detector.rpn import RPNConfig
from detector.sampling import NEGATIVE, POSITIVE, GroundTruth, Matches
from detector.step_record import ask
from detector.training.lightning_module import FasterRCNNModule
from detector.training.optimization import OptimizerConfig

PAPER: dict[str, Any] = {"cascade_ious": [0.5, 0.6, 0.7], "class_agnostic": True}
ALL: dict[str, Any] = {"samples_per_image": 100, "positive_fraction": 1.0}  # so that nothing is left to chance
SIZES = [(160, 200), (120, 150)]
OBJECTS = [[[20.0, 30, 90, 110], [100, 40, 190, 150]], [[10.0, 10, 60, 100]]]
LABELS = [[2, 3], [1]]
# Of an object of each image, moved along x: IoUs of 0.55, 0.65 and 0.75 and less; and elsewhere.
PROPOSALS = [
    [[20.0 + shift, 30, 90 + shift, 110] for shift in (0.0, 10, 15, 20, 40)] + [[110.0, 30, 199, 155], [0, 0, 30, 20]],
    [[10.0, 10 + shift, 60, 100 + shift] for shift in (3.0, 13, 19, 25)] + [[80.0, 20, 140, 110]],
]


def heads(**options: Any) -> CascadeRoIHeads:
    """Heads whose stages differ, and move boxes by a tenth of their sides or so."""
    torch.manual_seed(0)
    made = CascadeRoIHeads(TwoLayerHead(2, 5, 8), (16,), 3, RoIConfig(**PAPER | options))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def features() -> Tensor:
    return torch.randn(2, 5, 10, 13, generator=torch.Generator().manual_seed(1))


def batch() -> ImageBatch:
    return ImageBatch(torch.zeros(2, 3, 1, 1), SIZES, SIZES)


def truths() -> list[GroundTruth]:
    return [
        GroundTruth(torch.tensor(boxes), torch.tensor(labels), torch.zeros(len(labels), dtype=torch.bool))
        for boxes, labels in zip(OBJECTS, LABELS, strict=True)
    ]


# ---- the paper in plain Python, box by box ----

WEIGHTS = [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
Box = list[float]


def iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def targets(box: Box, goal: Box, stage: int) -> list[float]:
    (w, h), (gw, gh) = ((b[2] - b[0], b[3] - b[1]) for b in (box, goal))
    dx = (goal[0] + goal[2] - box[0] - box[2]) / 2 / w
    dy = (goal[1] + goal[3] - box[1] - box[3]) / 2 / h
    return [d * weight for d, weight in zip((dx, dy, log(gw / w), log(gh / h)), WEIGHTS[stage], strict=True)]


def moved(box: Box, deltas: list[float], stage: int, size: tuple[int, int]) -> Box:
    dx, dy, dw, dh = (d / weight for d, weight in zip(deltas, WEIGHTS[stage], strict=True))
    w, h = box[2] - box[0], box[3] - box[1]
    x, y, w, h = (box[0] + box[2]) / 2 + dx * w, (box[1] + box[3]) / 2 + dy * h, w * exp(dw), h * exp(dh)
    corners = (x - w / 2, size[1]), (y - h / 2, size[0]), (x + w / 2, size[1]), (y + h / 2, size[0])
    return [min(max(value, 0.0), limit) for value, limit in corners]


def network(made: CascadeRoIHeads, stage: int, boxes: list[list[Box]]) -> tuple[Tensor, Tensor]:
    """Class logits (R, 4) and deltas (R, 4) of all images' boxes, by the weights of a stage."""
    prefix = f"later.{stage - 1}." if stage else ""
    state = {name.removeprefix(prefix): own for name, own in made.state_dict().items() if name.startswith(prefix)}
    x = roi_align(features(), [torch.tensor(own) for own in boxes], 2, 1 / 16, 2, aligned=True).flatten(1)
    for layer in ("box_head.fc1", "box_head.fc2"):
        x = F.relu(F.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"]))
    logits, deltas = (
        F.linear(x, state[f"predictor.{layer}.weight"], state[f"predictor.{layer}.bias"])
        for layer in ("scores", "deltas")
    )
    return logits, deltas


def divided(rows: Tensor, boxes: list[list[Box]]) -> list[list[list[float]]]:
    return [own.tolist() for own in rows.split([len(own) for own in boxes])]


def test_losses_and_refined_boxes_are_the_papers() -> None:
    made = heads(**ALL)
    with closing(ask()) as record:
        proposals = [torch.tensor(own) for own in PROPOSALS]
        found = made.training_losses([features()], proposals, batch(), truths(), "drop")
    boxes, sums, positives = PROPOSALS, [0.0, 0.0], []
    for stage, (threshold, weight) in enumerate(zip((0.5, 0.6, 0.7), (1, 0.5, 0.25), strict=True)):
        rois = [own + objects for own, objects in zip(boxes, OBJECTS, strict=True)]
        logits, deltas = network(made, stage, rois)
        labels, box_loss = [], torch.zeros(())
        every = [(image, box) for image, own in enumerate(rois) for box in own]
        for (image, box), delta in zip(every, deltas, strict=True):
            overlaps = [iou(box, goal) for goal in OBJECTS[image]]
            best = overlaps.index(max(overlaps))
            labels.append(LABELS[image][best] if overlaps[best] >= threshold else 0)
            if labels[-1]:
                goal = torch.tensor(targets(box, OBJECTS[image][best], stage))
                box_loss = box_loss + F.smooth_l1_loss(delta, goal, reduction="sum")
        losses = F.cross_entropy(logits, torch.tensor(labels)), box_loss / len(every)
        for kind, (name, loss) in enumerate(zip(("cls", "reg"), losses, strict=True)):
            torch.testing.assert_close(found[f"loss_roi_{name}_{stage + 1}"], loss, rtol=1e-4, atol=1e-5)
            sums[kind] += weight * float(loss)
        positives.append(len(labels) - labels.count(0))
        if stage == 2:
            for own, of_image in zip(record.roi_candidates, rois, strict=True):  # positives come first
                assert sorted(own.tolist()) == [pytest.approx(box, abs=1e-3) for box in sorted(of_image)]
        # The objects are not refined: each stage adds them anew.
        boxes = [
            [moved(box, delta, stage, size) for box, delta in zip(own, of_image, strict=False)]
            for own, of_image, size in zip(boxes, divided(deltas, rois), SIZES, strict=True)
        ]
    assert len(set(positives)) == 3, "the thresholds must tell"
    assert [float(found[f"loss_roi_{name}"].detach()) for name in ("cls", "reg")] == pytest.approx(sums, rel=1e-4)
    assert list(found)[:2] == ["loss_roi_cls", "loss_roi_reg"] and len(found) == 8


def test_detections_have_mean_scores_and_the_last_stages_boxes() -> None:
    made = heads(score_threshold=0.2, nms_iou=0.4)
    proposals = [torch.tensor(own) for own in PROPOSALS]
    found = made.detections(*made.predictions([features()], proposals, batch()), batch())
    boxes, scores = PROPOSALS, torch.zeros(sum(map(len, PROPOSALS)), 4)
    for stage in range(3):
        logits, deltas = network(made, stage, boxes)
        scores = scores + logits.softmax(1) / 3
        boxes = [
            [moved(box, delta, stage, size) for box, delta in zip(own, of_image, strict=True)]
            for own, of_image, size in zip(boxes, divided(deltas, boxes), SIZES, strict=True)
        ]
    assert sum(len(own["boxes"]) for own in found) > 4
    for own, goals, of_image in zip(found, boxes, divided(scores, boxes), strict=True):
        likely = [
            (box, label, score)
            for box, row in zip(goals, of_image, strict=True)
            for label, score in enumerate(row)
            if label and score > 0.2
        ]
        expected = [torch.tensor(column) for column in zip(*likely, strict=True)]
        kept = batched_nms(expected[0], expected[2], expected[1], 0.4)
        for key, values in zip(("boxes", "labels", "scores"), expected, strict=True):
            torch.testing.assert_close(own[key], values[kept], rtol=1e-4, atol=1e-3)


def test_later_stages_draw_anew_and_from_the_lower_bound_of_background() -> None:
    made = heads(samples_per_image=4, positive_fraction=0.5, background_iou=[0.1, 0.5], delta_mean=[0.1, 0, 0, 0])
    assert [stage.config.background_iou for stage in made.stages] == [[0.1, 0.5], [0.1, 0.6], [0.1, 0.7]]
    assert [stage.config.delta_mean for stage in made.stages] == [[0.1, 0, 0, 0]] * 3
    with closing(ask()) as record:
        proposals = [torch.tensor(own) for own in PROPOSALS]
        made.training_losses([features()], proposals, batch(), truths(), "drop")
    assert all(len(own) <= 4 + len(truth.boxes) for own, truth in zip(record.roi_candidates, truths(), strict=True))
    assert all(int((rois.labels > 0).sum()) <= 2 for rois in record.sampled_rois)


@dataclass
class Shift(BoxCoder):
    """Four shifts of sides, a number for so many pixels."""

    pixels: float = 4.0

    def encode(self, boxes: Tensor, references: Tensor) -> Tensor:
        return (boxes - references) / self.pixels

    def decode(self, deltas: Tensor, references: Tensor) -> Tensor:
        return deltas * self.pixels + references


class Wide(Matcher):
    def __call__(self, candidates: Tensor, objects: Tensor, around: Around) -> Matches:
        """Give whatever is wider than 55 pixels the first object."""
        wide = candidates[:, 2] - candidates[:, 0] > 55
        kind = torch.where(wide, POSITIVE, NEGATIVE).to(torch.int8)
        return Matches(kind, torch.zeros(len(candidates), dtype=torch.int64), torch.zeros(len(candidates)))


def test_a_coder_and_a_matcher_of_ones_own_are_those_of_all_stages() -> None:
    made = heads(coder=Shift(), matcher=Wide(), append_gt=False, **ALL)
    proposals, maps = [torch.tensor(own) for own in PROPOSALS], [features()]
    sizes = [torch.tensor([200.0, 160, 200, 160]), torch.tensor([150.0, 120, 150, 120])]
    rois: list[Tensor] = proposals
    for stage in made.stages[:-1]:
        _, deltas = RoIHeads.forward(stage, maps, rois)
        moved = [own + 4 * of for own, of in zip(rois, deltas[:, 0].split([len(own) for own in rois]), strict=True)]
        rois = [torch.minimum(own.clamp(min=0), corners) for own, corners in zip(moved, sizes, strict=True)]
    _, _, refined = made.predictions(maps, proposals, batch())
    for own, expected in zip(refined, rois, strict=True):
        torch.testing.assert_close(own, expected)

    seen = []
    for stage in made.stages:
        with closing(ask()) as record:
            stage.sample_rois(rois, truths(), "drop", maps)
        seen.append(record)
    for record in seen:
        for sampled, truth in zip(record.sampled_rois, truths(), strict=True):
            wide = sampled.boxes[:, 2] - sampled.boxes[:, 0] > 55
            assert torch.equal(sampled.labels, torch.where(wide, truth.labels[0], 0))
            positive = sampled.boxes[wide]
            torch.testing.assert_close(sampled.deltas[wide], (truth.boxes[:1] - positive) / 4)
    assert any(bool((rois.labels > 0).any()) for rois in seen[0].sampled_rois)


def test_units_and_weights_of_the_stages() -> None:
    thirds = pytest.approx([0.1 / 3, 0.1 / 3, 0.2 / 3, 0.2 / 3])
    assert [stage.config.delta_std for stage in heads().stages][1:] == [[0.05, 0.05, 0.1, 0.1], thirds]
    rounded = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert [stage.config.delta_std for stage in heads(cascade_delta_std=rounded).stages] == rounded
    two = heads(cascade_ious=[0.5, 0.75], cascade_weights=[0.5, 2.0], **ALL)
    losses = two.training_losses([features()], [torch.tensor(own) for own in PROPOSALS], batch(), truths(), "drop")
    sums = 0.5 * losses["loss_roi_cls_1"] + 2 * losses["loss_roi_cls_2"]
    torch.testing.assert_close(losses["loss_roi_cls"], sums)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cascade_ious": [0.6, 0.7]}, r"roi\.cascade_ious: \[0.6, 0.7\] must begin with roi\.positive_iou = 0.5"),
        ({"cascade_ious": [0.5]}, r"roi\.cascade_ious: \[0.5\] .* one for each further stage"),
        ({"cascade_ious": [0.5, 1.5]}, r"roi\.cascade_ious: \[0.5, 1.5\] must be in \[0, 1\]"),
        ({"cascade_ious": [0.5, 0.6]}, r"roi\.cascade_weights: \[1.0, 0.5, 0.25\] must be one for each of"),
        ({"cascade_delta_std": [[0.1, 0.1, 0.2, 0.2]]}, r"roi\.cascade_delta_std: .* 4 positive numbers for each of"),
        ({"cascade_delta_std": [[1.0] * 4] * 3}, r"roi\.cascade_delta_std: .* must begin with roi\.delta_std"),
        ({"class_agnostic": False}, r"roi\.class_agnostic: false: a cascade refines one box .* give true"),
        ({"matcher": DynamicMatcher()}, r"roi\.matcher: dynamic moves the IoU"),
        (
            {"coder": Shift(), "cascade_delta_std": [[0.1, 0.1, 0.2, 0.2]] * 3},
            r"roi\.cascade_delta_std: is of roi\.coder",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoIConfig(**PAPER | options)


# ---- in a whole detector ----

IMAGES = [
    torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
]


def detector(image: dict[str, Any] | None = None, **roi: Any) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(
        3,
        BackboneConfig("small_c4", None, frozen_stages=0, norm="batch", pool_size=4, box_head_channels=32),
        AnchorConfig([1, 2], [1], straddling="keep"),
        RPNConfig(post_nms_train=30, post_nms_test=25),
        RoIConfig(**PAPER | {"samples_per_image": 16, "score_threshold": 0.01, "delta_init_std": 0.1} | roi),
        ImageConfig([64], 96, pad_multiple=8, **image or {}),
    )


def target(boxes: list[list[float]]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "difficult": torch.zeros(len(boxes), dtype=torch.bool),
    }


@pytest.mark.parametrize("options", [{}, {"ohem": True}, {"append_gt": "jittered"}, {"reg_loss": "giou"}])
@pytest.mark.parametrize("objects", [2, 0])
def test_gradients_reach_every_stage(objects: int, options: dict[str, Any]) -> None:
    model = detector(**options)
    boxes = [[3.0, 5, 40, 50], [50, 20, 90, 60]][:objects]
    losses = model.losses(IMAGES, [target(boxes), target([])])
    losses["loss"].backward()
    assert all(bool(loss.isfinite()) for loss in losses.values())
    gradients = {name: own.grad for name, own in model.roi_heads.named_parameters()}
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients.values())
    touched = {name for name, gradient in gradients.items() if gradient is not None and bool(gradient.any())}
    for prefix in ("", "later.0.", "later.1."):
        for layer in ("box_head.fc1.weight", "predictor.scores.weight", *["predictor.deltas.weight"] * bool(objects)):
            assert prefix + layer in touched
    stages = [losses[f"loss_roi_cls_{stage}"] for stage in (1, 2, 3)]
    torch.testing.assert_close(losses["loss_roi_cls"], stages[0] + 0.5 * stages[1] + 0.25 * stages[2])


def test_a_step_moves_every_stage() -> None:
    model = detector()
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.losses(IMAGES, [target([[3.0, 5, 40, 50]]), target([[10.0, 20, 30, 60]])])["loss"].backward()
    optimizer.step()
    still = {name for name, own in model.named_parameters() if torch.equal(before[name], own)}
    assert not {name for name in still if name.startswith("roi_heads.")}


def test_evaluation_is_recorded_and_seen_in_views() -> None:
    model = detector().eval()
    with torch.no_grad(), closing(ask()) as record:
        (detections, _), proposals = model(IMAGES), record.proposals
    assert len(detections[0]["boxes"]) > 3
    # The record holds the last stage's RoIs, by index the proposals that they come from.
    assert [len(own) for own in record.rois] == [len(own.kept) for own in proposals]
    for rois, own in zip(record.rois, proposals, strict=True):
        assert not torch.allclose(rois, own.boxes[own.kept], atol=0.5)
    scores = record.roi_logits.softmax(1)[:, 1:].split([len(own) for own in record.rois])
    for kept, of_image in zip(record.detections, scores, strict=True):
        torch.testing.assert_close(kept.scores, of_image[kept.rois, kept.labels - 1])
    seen = detector({"test_shortest_sides": [64]}).eval()  # a single view is what is seen without views
    with torch.no_grad():
        views, _ = seen(IMAGES)
    for alone, view in zip(detections, views, strict=True):
        torch.testing.assert_close(view["boxes"], alone["boxes"], rtol=1e-4, atol=1e-3)


def module(**options: Any) -> FasterRCNNModule:
    torch.manual_seed(0)
    return FasterRCNNModule(
        ["a", "b", "c"],
        BackboneConfig("small_c4", None, frozen_stages=0, norm="batch", pool_size=4, box_head_channels=32),
        AnchorConfig([1, 2], [1], straddling="keep"),
        RPNConfig(post_nms_train=30, post_nms_test=25),
        RoIConfig(**PAPER | {"samples_per_image": 16, "score_threshold": 0.01, "delta_init_std": 0.1}),
        ImageConfig([64], 96, pad_multiple=8),
        **options,
    )


def test_a_training_logs_the_stages_and_is_saved_whole(tmp_path: Path) -> None:
    made = module(optimizer=OptimizerConfig(lr=0.01, warmup_steps=0, ema_decay=0.5))
    batches = [(IMAGES, [target([[3.0, 5, 40, 50]]), target([[10.0, 20, 30, 60]])])] * 2
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(made, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for kind in ("cls", "reg"):
        stages = [logged[f"train/loss_roi_{kind}_{stage}"] for stage in (1, 2, 3)]
        total = stages[0] + 0.5 * stages[1] + 0.25 * stages[2]
        assert logged[f"train/loss_roi_{kind}"] == pytest.approx(total, rel=1e-4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = FasterRCNNModule.from_checkpoint(tmp_path / "last.ckpt")
    assert [stage.config for stage in loaded.model.roi_heads.stages] == [
        stage.config for stage in made.model.roi_heads.stages
    ]
    averaged = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(own, averaged[name]) for name, own in loaded.state_dict().items())


@pytest.mark.parametrize("step", [2, 4])
def test_alternating_training_trains_all_stages(step: int) -> None:
    made = module(training_scheme="alternating")
    made.scheme.restore({"alternating": {"step": step, "ends": []}})
    made.scheme.losses(IMAGES, [target([[3.0, 5, 40, 50]]), target([])])["loss"].backward()
    assert all(own.grad is not None for own in made.model.roi_heads.parameters())
    assert all(own.grad is None for own in made.model.rpn.parameters())
