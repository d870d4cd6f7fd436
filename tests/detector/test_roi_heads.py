"""RoI heads: pooling by level, training samples, class-specific boxes, and both losses."""

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import generalized_box_iou_loss, roi_align, roi_pool

from detector.backbones.box_heads import BoxPredictor, TwoLayerHead
from detector.boxes import decode, encode
from detector.errors import InputError
from detector.image_batch import ImageBatch
from detector.roi_heads import RoIConfig, RoIHeads
from detector.sampling import GroundTruth, SampledRoIs

NO_BOXES = torch.zeros(0, 4)

Heads = Callable[..., RoIHeads]
Batch = Callable[..., ImageBatch]
Boxes = Callable[..., Tensor]
Truth = Callable[..., GroundTruth]


def sampled_rois(labels: list[int], delta: float) -> SampledRoIs:
    number = len(labels)
    return SampledRoIs(
        torch.zeros(number, 4), torch.tensor(labels), torch.full((number, 4), delta), torch.arange(number)
    )


# Pooling


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (224, 224, 2),  # FPN, eq. 1: stride 16
        (112, 448, 2),  # its area counts, not its shape
        (223, 223, 1),
        (112, 112, 1),
        (111, 111, 0),
        (448, 448, 3),
        (1000, 900, 3),  # there is no coarser one
        (16, 8, 0),
        (0, 0, 0),
    ],
)
def test_level_of_a_roi(width: float, height: float, level: int, heads: Heads) -> None:
    box = torch.tensor([[30.0, 40.0, 30.0 + width, 40.0 + height]])
    assert heads(strides=(4, 8, 16, 32)).assign_levels(box).tolist() == [level]


def test_of_levels_with_one_stride_the_first_is_pooled(heads: Heads) -> None:
    """As torchvision does with MobileNetV3's two maps of stride 32."""
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in (20.0, 224.0, 447.0, 900.0)])
    assert heads(strides=(32, 32)).assign_levels(boxes).tolist() == [0] * 4
    assert heads(strides=(8, 16)).assign_levels(boxes).tolist() == [0, 1, 1, 1]


def test_pooled_features_keep_the_order_of_images_and_rois(heads: Heads) -> None:
    """Level `l` of image `i` holds 10 * l + i everywhere: each RoI shows where it was pooled from."""
    strides = (4, 8, 16, 32)
    values = torch.arange(4)[:, None] * 10.0 + torch.arange(3)
    features = [
        values[level].view(3, 1, 1, 1).expand(3, 5, 640 // stride, 640 // stride)
        for level, stride in enumerate(strides)
    ]
    sides = [[300.0, 20.0, 130.0, 500.0], [], [50.0, 240.0]]
    rois = [torch.tensor([[9.0, 9.0, 9.0 + side, 9.0 + side] for side in image]).view(-1, 4) for image in sides]
    pooled = heads(strides=strides).pool(features, rois)
    assert pooled.shape == (6, 5, 2, 2)
    torch.testing.assert_close(pooled, torch.tensor([20.0, 0, 10, 30, 2, 22]).view(6, 1, 1, 1).expand(6, 5, 2, 2))


@pytest.mark.parametrize("pooling", ["roi_align", "roi_align_legacy", "roi_pool"])
@pytest.mark.parametrize("sampling_ratio", [0, 2, 3])
def test_pooling_is_torchvisions(pooling: str, sampling_ratio: int, heads: Heads, random_boxes: Boxes) -> None:
    """Values and gradients, on an oblong map, with RoIs that reach over its border."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 9, 13, generator=generator)
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    rois = [torch.cat((random_boxes(6, seed=1), torch.tensor([[-40.0, -50.0, 30.0, 20.0]]))), random_boxes(4, seed=2)]
    config = {"pooling": pooling, "sampling_ratio": sampling_ratio}
    pooled = heads(pool_size=3, **config).pool([ours], rois)
    if pooling == "roi_pool":
        expected = roi_pool(theirs, rois, 3, 1 / 16)
    else:
        expected = roi_align(theirs, rois, 3, 1 / 16, sampling_ratio or -1, aligned=pooling == "roi_align")
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(pooled.shape, generator=generator)
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_pooling_on_whole_cells(heads: Heads) -> None:
    """Columns 1 to 3 and rows 0 to 4 of the second level; torchvision's operator would take other cells."""
    features = [torch.randn(2, 5, 12, 14), torch.randn(2, 5, 6, 7)]
    rois = [NO_BOXES, torch.tensor([[28.0, 15.0, 50.0, 64.0]])]
    roi_heads = heads(strides=(8, 16), pooling="roi_pool_floor")
    roi_heads.canonical_level_side = 16.0
    expected = torch.nn.functional.adaptive_max_pool2d(features[1][1, :, 0:5, 1:4], 2)
    torch.testing.assert_close(roi_heads.pool(features, rois), expected[None])
    roi_heads.config.pooling = "roi_pool"
    assert not torch.equal(roi_heads.pool(features, rois), expected[None])


@pytest.mark.parametrize("strides", [(16,), (8, 16)])
def test_no_rois(strides: tuple[int, ...], heads: Heads, image_batch: Batch) -> None:
    roi_heads = heads(strides=strides)
    features = [torch.randn(2, 5, 4, 4) for _ in strides]
    logits, deltas = roi_heads(features, [NO_BOXES, NO_BOXES])
    assert (logits.shape, deltas.shape) == ((0, 4), (0, 3, 4))
    found = roi_heads.detections(logits, deltas, [NO_BOXES, NO_BOXES], image_batch((64, 64), (64, 64)))
    assert [(d["boxes"].shape, len(d["labels"]), len(d["scores"])) for d in found] == [((0, 4), 0, 0)] * 2


# Training samples


@pytest.mark.parametrize(
    ("difficult", "expected"),
    [
        ("drop", {0: 2, 1: 3, 2: 0, 3: 0}),
        ("keep", {0: 2, 1: 3, 2: 1, 3: 0}),
        ("ignore", {0: 2, 1: 3, 3: 0}),
    ],
)
@pytest.mark.parametrize("append", [False, True])
def test_labels_and_deltas_of_sampled_rois(
    difficult: str,
    expected: dict[int, int],
    append: bool,
    heads: Heads,
    three_objects: GroundTruth,
    four_proposals: Tensor,
) -> None:
    roi_heads = heads(append_gt=append, delta_std=[0.1, 0.2, 0.4, 0.5], samples_per_image=50, positive_fraction=0.5)
    (rois,) = roi_heads.sample_rois([four_proposals], [three_objects], difficult)
    wanted = [(four_proposals[place].tolist(), label) for place, label in expected.items()]
    if append:
        wanted += [([0, 0, 40, 20], 2), ([100, 50, 120, 90], 3)]
        wanted += [([60, 0, 70, 10], 1)] if difficult == "keep" else []
    found = list(zip(rois.boxes.tolist(), rois.labels.tolist(), strict=True))
    assert sorted(found) == sorted(wanted)
    # Positives come first.
    assert (rois.labels > 0).tolist() == sorted((rois.labels > 0).tolist(), reverse=True)
    half = rois.boxes.tolist().index([0, 0, 20, 20])  # its object lies half its width to the right and is twice as wide
    torch.testing.assert_close(rois.deltas[half], torch.tensor([0.5 / 0.1, 0.0, log(2) / 0.4, 0.0]))
    others = torch.arange(len(found)) != half
    assert (rois.deltas[others] == 0).all()


def test_jittered_ground_truth_is_appended_beside_the_exact_one(heads: Heads, truth: Truth) -> None:
    objects = truth([[0, 0, 200, 100], [300, 50, 340, 250]], [1, 2], [False, True])
    torch.manual_seed(0)
    for jitter, reach in ((0.05, 0.025), (0.4, 0.2)):
        roi_heads = heads(append_gt="jittered", gt_jitter=jitter, positive_fraction=1.0)
        (rois,) = roi_heads.sample_rois([NO_BOXES], [objects], "drop")  # a difficult object is not appended
        assert rois.labels.tolist() == [1, 1]
        assert rois.boxes[0].tolist() == [0, 0, 200, 100]
        shift = rois.boxes[1] - rois.boxes[0]
        torch.testing.assert_close(shift[:2], shift[2:])
        assert 0 < abs(float(shift[0])) <= reach * 200
        assert 0 < abs(float(shift[1])) <= reach * 100
        # Back to the object, in units of 0.1 sides.
        expected = torch.tensor([-shift[0] / 200 / 0.1, -shift[1] / 100 / 0.1, 0.0, 0.0])
        torch.testing.assert_close(rois.deltas[1], expected, atol=1e-4, rtol=1e-4)
    for append, count in ((True, 1), (False, 0)):
        (rois,) = heads(append_gt=append).sample_rois([NO_BOXES], [objects], "drop")
        assert len(rois.boxes) == count


def test_jitter_alone_uses_random_numbers(heads: Heads, truth: Truth, four_proposals: Tensor) -> None:
    objects = truth([[0, 0, 200, 100]], [1])
    states = []
    for append in (True, "jittered"):
        torch.manual_seed(3)
        heads_state = torch.get_rng_state()
        roi_heads = heads(append_gt=append)
        torch.set_rng_state(heads_state)
        roi_heads.sample_rois([four_proposals], [objects], "drop")
        states.append(torch.equal(torch.get_rng_state(), heads_state))
    assert states == [True, False]


def test_targets_with_mean_and_without_normalisation(heads: Heads, image_batch: Batch, truth: Truth) -> None:
    """A RoI on the left half of an object of 40 x 20: dx 0.5, dw ln 2."""
    objects, roi = truth([[0, 0, 40, 20]], [2]), torch.tensor([[0.0, 0, 20, 20]])
    for options, expected in (
        ({}, [5.0, 0, log(2) / 0.2, 0]),
        ({"delta_std": [1.0, 1.0, 1.0, 1.0]}, [0.5, 0, log(2), 0]),
        (
            {"delta_mean": [0.1, 0.2, 0.3, -0.4], "delta_std": [0.1, 0.5, 0.2, 0.4]},
            [4.0, -0.4, (log(2) - 0.3) / 0.2, 1.0],
        ),
    ):
        roi_heads = heads(append_gt=False, score_threshold=0.5, **options)  # type: ignore[arg-type]
        (rois,) = roi_heads.sample_rois([roi], [objects], "drop")
        torch.testing.assert_close(rois.deltas, torch.tensor([expected]))
        # The way back: predicted targets give the object.
        logits = torch.tensor([[0.0, 0.0, 9.0, 0.0]])
        (found,) = roi_heads.detections(logits, rois.deltas[:, None].expand(1, 3, 4), [roi], image_batch((50, 60)))
        torch.testing.assert_close(found["boxes"], objects.boxes.float(), atol=1e-4, rtol=0)


def test_sampled_rois_keep_the_given_shares_and_the_lower_bound_of_background(heads: Heads, truth: Truth) -> None:
    objects = truth([[0, 0, 100, 100]], [1])
    heights = torch.cat((torch.full((40,), 50.0), torch.full((200,), 10.0), torch.full((300,), 9.0)))  # IoU x 100
    boxes = torch.stack((torch.zeros(540), torch.zeros(540), torch.full((540,), 100.0), heights), dim=1)
    options = {"samples_per_image": 64, "positive_fraction": 0.25, "append_gt": False}
    (rois,) = heads(background_iou=[0.1, 0.5], **options).sample_rois([boxes], [objects], "drop")
    assert [int((rois.labels == label).sum()) for label in (1, 0)] == [16, 48]
    assert set(rois.boxes[rois.labels == 0][:, 3].tolist()) == {10.0}
    (few,) = heads(background_iou=[0.1, 0.5], **options).sample_rois([boxes[240:]], [objects], "drop")
    assert len(few.boxes) == 0  # nothing is padded


def test_images_are_sampled_apart(heads: Heads, truth: Truth, four_proposals: Tensor) -> None:
    objects = [truth([[0, 0, 40, 20]], [2]), truth([], []), truth([[0, 0, 40, 20]], [3])]
    sampled = heads(append_gt=True).sample_rois([four_proposals, four_proposals, NO_BOXES], objects, "drop")
    assert [rois.labels.tolist()[:2] for rois in sampled] == [[2, 2], [0, 0], [3]]
    assert [len(rois.boxes) for rois in sampled] == [5, 4, 1]


def test_thirty_objects(heads: Heads, truth: Truth) -> None:
    boxes = [[x * 30.0, y * 30.0, x * 30.0 + 20, y * 30.0 + 10] for y in range(5) for x in range(6)]
    (rois,) = heads(35).sample_rois([NO_BOXES], [truth(boxes, list(range(1, 31)))], "drop")
    assert sorted(rois.labels.tolist()) == list(range(1, 31))


def test_training_samples_equal_torchvisions_when_all_are_kept(
    heads: Heads, random_boxes: Boxes, truth: Truth, torchvision_heads: Callable[[RoIConfig], TorchvisionRoIHeads]
) -> None:
    roi_heads = heads(samples_per_image=10**6)
    proposals = [random_boxes(600, 1), random_boxes(50, 2)]
    objects = [truth(random_boxes(4, 3).tolist(), [1, 2, 3, 1]), truth([], [])]
    ours = roi_heads.sample_rois(proposals, objects, "drop")
    boxes, _, labels, deltas = torchvision_heads(roi_heads.config).select_training_samples(
        list(proposals), [{"boxes": t.boxes, "labels": t.labels} for t in objects]
    )
    assert int((labels[0] > 0).sum()) > 10
    for image, rois in enumerate(ours):
        # Theirs are in the order of the proposals; their background has deltas too, which nobody reads.
        order = torch.cat((torch.where(labels[image] > 0)[0], torch.where(labels[image] == 0)[0]))
        torch.testing.assert_close(rois.boxes, boxes[image][order])
        assert torch.equal(rois.labels, labels[image][order])
        positive = rois.labels > 0
        torch.testing.assert_close(rois.deltas[positive], deltas[image][order][positive], atol=1e-4, rtol=1e-5)


# Losses


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("none", (3 * log(4) + 2) / 5),
        # One object, four of background at a quarter each.
        ("balanced", (log(4) + (2 * log(4) + 2) / 4) / 2),
        ([0.5, 9.0, 9.0, 3.0], (3 * log(4) + 0.5 * (2 * log(4) + 2)) / (3 + 4 * 0.5)),
    ],
)
def test_class_weights(weights: Any, expected: float, heads: Heads) -> None:
    """Three RoIs at ln 4, of which one is an object of class 3, and two of background at 1 each."""
    easy = log((exp(1) - 1) / 3)  # ln(1 + 3 e^x) = 1
    logits = torch.zeros(5, 4)
    logits[3:, 1:] = easy
    sampled = [sampled_rois([3, 0, 0, 0, 0], 0.0)]
    loss = heads(class_weights=weights).losses(logits, torch.zeros(5, 3, 4), sampled)["loss_roi_cls"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("normalizer", "count"), [("samples", 4), ("positives", 3), ("samples_per_image", 2 * 50)])
def test_normalisers_of_the_box_loss(normalizer: str, count: int, heads: Heads) -> None:
    roi_heads = heads(reg_normalizer=normalizer, samples_per_image=50)
    sampled = [sampled_rois([3, 1, 0], 0.5), sampled_rois([2], 3.0)]
    loss = roi_heads.losses(torch.zeros(4, 4), torch.zeros(4, 3, 4), sampled)["loss_roi_reg"]
    assert float(loss) == pytest.approx((0.5 + 0.5 + 10) / count)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_the_box_loss_of_decoded_boxes(class_agnostic: bool, heads: Heads) -> None:
    """Deltas are undone at each RoI with their mean and deviation; background and other classes take no part."""
    units = {"delta_std": [0.1, 0.2, 0.4, 0.5], "delta_mean": [0.0, 0.5, 0.0, 0.1]}
    roi_heads = heads(class_agnostic=class_agnostic, reg_loss="giou", reg_normalizer="positives", **units)
    rois = torch.tensor([[10.0, 20.0, 40.0, 60.0], [0.0, 0.0, 9.0, 9.0], [50.0, 10.0, 60.0, 90.0]])
    objects = torch.tensor([[12.0, 20.0, 45.0, 70.0], [0.0, 0.0, 9.0, 9.0], [45.0, 30.0, 70.0, 80.0]])
    labels, mean = torch.tensor([2, 0, 1]), torch.tensor(units["delta_mean"])
    targets = (encode(objects, rois) - mean) / torch.tensor(units["delta_std"])
    sampled = [SampledRoIs(rois[:2], labels[:2], targets[:2], labels), SampledRoIs(rois[2:], labels[2:], targets[2:],
               labels)]  # fmt: skip
    deltas = torch.full((3, 1 if class_agnostic else 3, 4), 9.0)
    own = torch.tensor([[0.5, 1.0, -0.5, 0.2], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.3, 0.7]])
    deltas[[0, 1, 2], [0, 0, 0] if class_agnostic else [1, 0, 0]] = own
    loss = roi_heads.losses(torch.zeros(3, 4), deltas, sampled)["loss_roi_reg"]
    boxes = decode(own * torch.tensor(units["delta_std"]) + mean, rois)
    torch.testing.assert_close(loss, generalized_box_iou_loss(boxes, objects)[[0, 2]].mean(), rtol=1e-5, atol=0)


def test_initial_weights_of_the_predictor() -> None:
    torch.manual_seed(0)
    for options, stds in (({}, (0.01, 0.001)), ({"score_init_std": 0.2, "delta_init_std": 0.05}, (0.2, 0.05))):
        predictor = RoIHeads(TwoLayerHead(1, 5, 256), (16,), 20, RoIConfig(**options)).predictor
        assert predictor.scores.weight.shape == (21, 256)
        found = float(predictor.scores.weight.detach().std()), float(predictor.deltas.weight.detach().std())
        assert found == pytest.approx(stds, rel=0.05)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_the_box_of_the_own_class_is_trained_and_never_that_of_background(class_agnostic: bool, heads: Heads) -> None:
    roi_heads = heads(class_agnostic=class_agnostic, reg_beta=1.0)
    deltas = torch.zeros(4, 1 if class_agnostic else 3, 4, requires_grad=True)
    sampled = [sampled_rois([3, 1, 0], 0.5), sampled_rois([2], 3.0)]
    logits = torch.zeros(4, 4)
    losses = roi_heads.losses(logits, deltas, sampled)
    assert float(losses["loss_roi_cls"]) == pytest.approx(log(4))
    # Two positives with 4 x 0.5^2 / 2, one with 4 x (3 - 0.5), over four samples.
    assert float(losses["loss_roi_reg"].detach()) == pytest.approx((0.5 + 0.5 + 10) / 4)
    losses["loss_roi_reg"].backward()
    assert deltas.grad is not None
    touched = deltas.grad.abs().sum(dim=2).nonzero().tolist()
    assert touched == [[0, 0], [1, 0], [3, 0]] if class_agnostic else touched == [[0, 2], [1, 0], [3, 1]]


def test_losses_equal_torchvisions(heads: Heads) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(40, 4, generator=generator), torch.randn(40, 3, 4, generator=generator)
    labels = torch.randint(4, (40,), generator=generator)
    targets = torch.randn(40, 4, generator=generator)
    sampled = [SampledRoIs(torch.zeros(n, 4), part, goal, torch.arange(n)) for n, part, goal in
               zip((25, 15), labels.split([25, 15]), targets.split([25, 15]), strict=True)]  # fmt: skip
    ours = heads(reg_beta=1 / 9).losses(logits, deltas, sampled)
    with_background = torch.cat((torch.full((40, 1, 4), 99.0), deltas), dim=1).flatten(1)
    cls, reg = fastrcnn_loss(logits, with_background, [labels], [targets])
    torch.testing.assert_close(ours["loss_roi_cls"], cls, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["loss_roi_reg"], reg, rtol=1e-5, atol=0)


# Options and the predictor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background_iou": [0.5, 0.1]}, r"roi\.background_iou: \[0.5, 0.1\]"),
        ({"background_iou": [0.0, 0.6]}, r"roi\.positive_iou = 0.5"),
        ({"delta_std": [0.1, 0.1, 0.2]}, r"roi\.delta_std: \[0.1, 0.1, 0.2\] has 3 numbers, needs 4"),
        ({"delta_std": [0.1, 0.1, 0.2, 0]}, r"roi\.delta_std: .* must be positive"),
        ({"delta_mean": [0.0] * 5}, r"roi\.delta_mean: .* has 5 numbers, needs 4"),
        ({"append_gt": "maybe"}, r"roi\.append_gt: 'maybe' is none of true, false, jittered"),
        ({"class_weights": "even"}, r"roi\.class_weights: 'even' is none of none, balanced, a list"),
        ({"class_weights": [0.0, 0.0]}, r"roi\.class_weights: \[0.0, 0.0\]"),
        ({"nms": "soft"}, r"roi\.nms: 'soft' is none of hard, soft_linear, soft_gaussian"),
        ({"soft_nms_sigma": 0.0}, r"roi\.soft_nms_sigma: 0.0 must be positive"),
        ({"ohem_nms_iou": 7}, r"roi\.ohem_nms_iou: 7 must be in \[0, 1\]"),
        ({"detections_per_image": 0}, r"roi\.detections_per_image: 0 must be >= 1"),
        ({"pooling": "max"}, r"roi\.pooling: 'max' is none of roi_align, .*, roi_pool_floor"),
        ({"reg_loss": "l2"}, r"roi\.reg_loss: 'l2' is none of smooth_l1, iou, giou, diou, ciou"),
        ({"positive_fraction": 1.5}, r"roi\.positive_fraction: 1.5 must be in \(0, 1\]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoIConfig(**options)


def test_a_wrong_number_of_class_weights_names_both(heads: Heads) -> None:
    with pytest.raises(InputError, match=r"roi\.class_weights: 3 numbers for 3 classes; give 4, the first for back"):
        heads(class_weights=[1.0, 2.0, 3.0])


def test_predictor_is_float32_under_autocast() -> None:
    """Scores that differ by less than bfloat16 can tell apart keep their order."""
    predictor = BoxPredictor(2, 1, class_agnostic=True)
    with torch.no_grad():
        predictor.scores.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.001]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, deltas = predictor(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert logits.dtype == deltas.dtype == torch.float32
    torch.testing.assert_close(logits[:, 1], torch.tensor([1.0, 1.001]), rtol=0, atol=1e-6)
