"""Whole detectors of other code bases: recognised, translated, and refused with the options that would fit."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, nms, roi_pool

from detector import VOC_CLASSES, VOC_TO_COCO
from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.training.lightning_module import FasterRCNNModule
from detector.translation.foreign_checkpoints import COCO_NAMES, load_detector

State = dict[str, Tensor]
RESNET18 = {"name": "resnet18_fpn", "weights": "file", "pool_size": 2, "box_head_channels": 48, "norm": "batch"}
TWO_SCALES = {"base_size": 1, "scales": [40, 90], "aspect_ratios": [0.5, 1, 3], "center_offset": "zero"}
PREDICTOR = [f"roi_heads.predictor.{layer}.{kind}" for layer in ("scores", "deltas") for kind in ("weight", "bias")]


def build(backbone: dict[str, Any], classes: int, **options: Any) -> tuple[FasterRCNN, BackboneConfig]:
    config = BackboneConfig(**backbone)
    torch.manual_seed(7)
    model = FasterRCNN(
        classes,
        config,
        AnchorConfig(**options.get("anchors", TWO_SCALES)),
        RPNConfig(**options.get("rpn", {})),
        RoIConfig(**options.get("roi", {})),
        ImageConfig(**options.get("image", {"shortest_side": [96], "longest_side": 128})),
        load_weights=False,
    )
    return model.eval(), config


@pytest.fixture(scope="module")
def coco_state() -> State:
    """A detector of torchvision on ResNet-18, for COCO's 90 classes, with 6 anchors per location and a small box head;
    all tensors random."""
    torch.manual_seed(0)
    network = TorchvisionFasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d),
        rpn_anchor_generator=AnchorGenerator(((40, 90),) * 5, ((0.5, 1.0, 3.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 2, 2),
        box_head=TwoMLPHead(256 * 4, 48),
        box_predictor=FastRCNNPredictor(48, 91),
    )
    for name, parameter in network.named_parameters():
        if "rpn" in name or "predictor" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network.state_dict()


@pytest.fixture(scope="module")
def coco_file(coco_state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "coco.pth"
    torch.save(coco_state, path)
    return path


def detections(model: FasterRCNN) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    image = (torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    with torch.no_grad():
        return model([image])


def test_coco_names_are_torchvisions() -> None:
    categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert ["" if name == "N/A" else name for name in categories[1:]] == COCO_NAMES
    assert set(VOC_TO_COCO) < set(VOC_CLASSES) and len(VOC_CLASSES) == 20


def test_voc_classes_take_cocos_rows_by_name(coco_state: State, coco_file: Path) -> None:
    names = ["sofa", "person", *VOC_CLASSES[:2]]  # in an order of their own
    model, config = build(RESNET18, 4)
    report = load_detector(model, config, names, coco_file, "match")
    rows = [0, 63, 1, 5, 2]  # COCO's ids
    scores, deltas = model.roi_heads.predictor.scores, model.roi_heads.predictor.deltas
    assert torch.equal(scores.weight, coco_state["roi_heads.box_predictor.cls_score.weight"][rows])
    assert torch.equal(scores.bias, coco_state["roi_heads.box_predictor.cls_score.bias"][rows])
    expected = coco_state["roi_heads.box_predictor.bbox_pred.weight"].view(91, 4, 48)[rows[1:]]
    torch.testing.assert_close(deltas.weight.view(4, 4, 48), expected)
    assert (report.missing, report.unexpected, report.remark) == ([], [], "4 of its 90 classes, by name")
    assert report.summary().endswith("unexpected: none; 4 of its 90 classes, by name")
    model, config = build(RESNET18, 20)
    assert load_detector(model, config, VOC_CLASSES, coco_file, "match").missing == []


@pytest.mark.parametrize(
    ("names", "predictor", "remark"),
    [
        (["cat", "unicorn"], "match", "predictor left at random: the file has 90 classes, the data 2"),
        (["cat", "dog"], "random", "predictor left at random: as asked for"),
    ],
)
def test_other_classes_leave_the_predictor_at_random(
    coco_state: State, coco_file: Path, names: list[str], predictor: Any, remark: str
) -> None:
    model, config = build(RESNET18, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_detector(model, config, names, coco_file, predictor)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert sorted(report.missing) == sorted(PREDICTOR) and report.remark == remark
    assert not changed & set(PREDICTOR)
    theirs = coco_state["roi_heads.box_head.fc7.weight"]
    assert torch.equal(model.state_dict()["roi_heads.box_head.fc2.weight"], theirs)
    weights = {name for name in before if name.endswith("weight")}
    assert {name for name in weights if "norm" not in name and "bn" not in name} - changed == {
        name for name in PREDICTOR if name.endswith("weight")
    } | {name for name in before if re.search(r"downsample\.1\.weight", name)}  # norms of weight 1 on both sides
    assert report.loaded == len([name for name in before if "num_batches" not in name]) - 4


def test_anchor_order_objectness_and_delta_std_are_those_of_the_options(coco_file: Path) -> None:
    """Whatever they are, the same weights give the same proposals and detections."""
    names = [f"class {n}" for n in range(90)]
    results = []
    for anchors, rpn, roi in (
        ({}, {}, {}),
        ({"order": "scale_major"}, {"objectness": "softmax"}, {"delta_std": [0.2, 0.1, 0.4, 1.0]}),
    ):
        options = {"anchors": TWO_SCALES | anchors, "rpn": rpn | {"post_nms_test": 40}, "roi": roi}
        model, config = build(RESNET18, 90, **options)
        load_detector(model, config, names, coco_file, "match")
        results.append(detections(model))
    (mine, proposals), (other, other_proposals) = results
    assert len(mine[0]["scores"]) >= 5 and len(proposals[0]) >= 20
    torch.testing.assert_close(proposals[0], other_proposals[0], rtol=0, atol=1e-3)
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(mine[0][key], other[0][key], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("backbone", "options", "words"),
    [
        ({"name": "vgg16"}, {}, ["backbone.name resnet18_fpn (is vgg16)"]),
        ({"fpn_norm": "batch"}, {}, ["backbone.fpn_norm none (is batch)"]),
        ({"box_head": "conv_fc"}, {}, ["backbone.box_head two_fc (is conv_fc)"]),
        ({"box_head_channels": 32}, {}, ["backbone.box_head_channels 48 (is 32)"]),
        ({"pool_size": 7}, {}, ["backbone.pool_size 2 (is 7)"]),
        ({"fpn_channels": 128}, {}, ["backbone.fpn_channels 256 (is 128)"]),
        ({}, {"rpn": {"conv_depth": 2}}, ["rpn.conv_depth 1 (is 2)"]),
        ({}, {"roi": {"class_agnostic": True}}, ["roi.class_agnostic false (is true)"]),
        ({}, {"anchors": {}}, ["anchors per location", "anchors.scales", "6 (is 9)"]),
    ],
)
def test_options_of_another_network_are_refused_with_those_that_fit(
    coco_file: Path, backbone: dict[str, Any], options: dict[str, Any], words: list[str]
) -> None:
    with torch.device("meta"):
        model, config = build(RESNET18 | backbone, 90, **options)
    with pytest.raises(InputError) as caught:
        load_detector(model, config, COCO_NAMES, coco_file, "match")
    for word in ["weights ", str(coco_file), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unusable_files_are_refused(coco_state: State, tmp_path: Path) -> None:
    model, config = build(RESNET18, 90)

    def message(content: object) -> str:
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(InputError) as caught:
            load_detector(model, config, COCO_NAMES, tmp_path / "weights.pth", "match")
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    with pytest.raises(InputError, match=r"^weights .*absent\.pth: no such file"):
        load_detector(model, config, COCO_NAMES, tmp_path / "absent.pth", "match")
    assert "no detector of a known layout" in message({"conv1.weight": torch.zeros(1)})
    assert "'conv1.weight'" in message({"conv1.weight": torch.zeros(1)})
    ours_alone = {"state_dict": {"model.rpn.head.objectness.weight": torch.zeros(1)}}
    assert "is of another backbone: backbone.body.conv1.weight is missing there" in message(ours_alone)
    deeper = coco_state | {"backbone.body.layer3.2.conv1.weight": torch.zeros(1)}
    assert "on a backbone that is not there; known are resnet18_fpn" in message(deeper)
    for theirs, ours in (
        ("rpn.head.bbox_pred.weight", "rpn.head.deltas.weight"),
        ("rpn.head.cls_logits.bias", ".bias"),
    ):
        without = {name: tensor for name, tensor in coco_state.items() if name != theirs}
        assert "lacks what would be our 'rpn.head." in (line := message(without)) and ours in line
    assert "not a readable weights file" in message(model)


def test_a_model_takes_a_whole_detector_instead_of_backbone_weights(
    coco_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the backbone's weights nor, from a checkpoint, the detector's file are asked for."""
    options: dict[str, Any] = {
        "backbone": BackboneConfig(**(RESNET18 | {"weights": "none", "norm": "frozen"})),  # not random: from the file
        "anchors": AnchorConfig(**TWO_SCALES),
    }
    copy = tmp_path / "copy.pth"
    copy.write_bytes(coco_file.read_bytes())
    module = FasterRCNNModule(COCO_NAMES, **options, weights=str(copy))
    assert module.weights_report is not None and module.weights_report.missing == []
    assert module.hparams["weights"] == str(copy)
    logged: list[str] = []
    monkeypatch.setattr("detector.training.lightning_module.rank_zero_info", logged.append)
    module.setup("fit")
    assert logged == [module.weights_report.summary()] and f"weights from {copy}: " in logged[0]
    copy.unlink()
    again = FasterRCNNModule(**module.hparams, load_backbone_weights=False)
    again.load_state_dict(module.state_dict())
    with pytest.raises(InputError, match=r"^weights .*copy\.pth: no such file"):
        FasterRCNNModule(**module.hparams)
    without = options | {"backbone": BackboneConfig(**(RESNET18 | {"weights": "none", "norm": "frozen"}))}
    with pytest.raises(InputError, match="random weights would stay frozen"):
        FasterRCNNModule(COCO_NAMES, **without)


# chenyuntc/simple-faster-rcnn-pytorch: boxes are (y1, x1, y2, x2), deltas (dy, dx, dh, dw), objectness two scores.

SCALES, RATIOS = [2, 3, 5], [0.5, 1, 3]
SIZE = (96, 128)


def chenyuntc_state() -> State:
    """A checkpoint of that layout, pooled to 2 x 2 cells, with random weights that give several detections."""
    torch.manual_seed(5)
    state: State = {}
    channels = 3
    for index, width in zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, 128, 128, *[256] * 3, *[512] * 6), strict=True
    ):
        state[f"extractor.{index}.weight"] = torch.randn(width, channels, 3, 3) * math.sqrt(2 / (9 * channels))
        state[f"extractor.{index}.bias"] = torch.randn(width) * 0.1
        channels = width
    for name, shape, std in (
        ("rpn.conv1", (512, 512, 3, 3), 0.01),
        ("rpn.score", (18, 512, 1, 1), 0.05),
        ("rpn.loc", (36, 512, 1, 1), 0.01),
        ("head.classifier.0", (4096, 2048), 0.02),
        ("head.classifier.2", (4096, 4096), 0.02),
        ("head.cls_loc", (84, 4096), 0.01),
        ("head.score", (21, 4096), 0.03),
    ):
        state[f"{name}.weight"] = torch.randn(shape) * std
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.3
    return state


def loc2bbox(boxes: Tensor, locs: Tensor) -> Tensor:
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    cy = boxes[:, 0] + height / 2 + locs[:, 0] * height
    cx = boxes[:, 1] + width / 2 + locs[:, 1] * width
    h, w = height * locs[:, 2].exp(), width * locs[:, 3].exp()
    return torch.stack((cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2), dim=1)


def clipped(boxes: Tensor) -> Tensor:
    return torch.stack([boxes[:, i].clamp(0, SIZE[i % 2]) for i in range(4)], dim=1)


def original_detections(state: State, image: Tensor) -> list[tuple[float, int, list[float]]]:
    """The published forward pass for one image that is not resized: (score, class from 0, box in y1 x1 y2 x2)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image / 255 - mean[:, None, None]) / std[:, None, None])[None]
    for index in range(30):
        if f"extractor.{index}.weight" in state:
            x = F.relu(F.conv2d(x, state[f"extractor.{index}.weight"], state[f"extractor.{index}.bias"], padding=1))
        elif index in (4, 9, 16, 23):
            x = F.max_pool2d(x, 2, 2)
    hidden = F.relu(F.conv2d(x, state["rpn.conv1.weight"], state["rpn.conv1.bias"], padding=1))
    locs = F.conv2d(hidden, state["rpn.loc.weight"], state["rpn.loc.bias"]).permute(0, 2, 3, 1).reshape(-1, 4)
    scores = F.conv2d(hidden, state["rpn.score.weight"], state["rpn.score.bias"]).permute(0, 2, 3, 1).reshape(-1, 2)
    anchors = [
        (y - h / 2, z - w / 2, y + h / 2, z + w / 2)
        for y in range(8, SIZE[0], 16)
        for z in range(8, SIZE[1], 16)
        for ratio in RATIOS
        for scale in SCALES
        for h, w in [(16 * scale * math.sqrt(ratio), 16 * scale * math.sqrt(1 / ratio))]
    ]
    rois = clipped(loc2bbox(torch.tensor(anchors), locs))
    large = ((rois[:, 2:] - rois[:, :2]) >= 16).all(1)
    rois, objectness = rois[large], scores.softmax(1)[large, 1]
    rois = rois[nms(rois, objectness, 0.7)[:300]]
    pooled = roi_pool(x, [rois[:, [1, 0, 3, 2]]], 2, 1 / 16).flatten(1)
    for layer in ("head.classifier.0", "head.classifier.2"):
        pooled = F.relu(F.linear(pooled, state[f"{layer}.weight"], state[f"{layer}.bias"]))
    locs = F.linear(pooled, state["head.cls_loc.weight"], state["head.cls_loc.bias"]).view(-1, 21, 4)
    locs = locs * torch.tensor([0.1, 0.1, 0.2, 0.2])
    probabilities = F.linear(pooled, state["head.score.weight"], state["head.score.bias"]).softmax(1)
    found = []
    for label in range(1, 21):
        chosen = probabilities[:, label] > 0.05
        boxes, scores = clipped(loc2bbox(rois[chosen], locs[chosen, label])), probabilities[chosen, label]
        for index in nms(boxes, scores, 0.3).tolist():
            found.append((float(scores[index]), label - 1, boxes[index].tolist()))
    return sorted(found, reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("objectness", ["softmax", "sigmoid"])
def test_chenyuntcs_detector_gives_its_original_detections(objectness: str, tmp_path: Path) -> None:
    state = chenyuntc_state()
    # Its trainer saves the metric, a NumPy number, beside the model; file names end in that number.
    path = tmp_path / "fasterrcnn_12211511_0.7"
    torch.save({"model": state, "config": {"lr": 0.001}, "other_info": {"best_map": np.float64(0.7)}}, path)
    model, config = build(
        {"name": "vgg16", "weights": "file", "pool_size": 2},
        20,
        anchors={"scales": SCALES, "aspect_ratios": RATIOS},
        rpn={"objectness": objectness, "min_side": 16},
        roi={"pooling": "roi_pool", "nms_iou": 0.3, "detections_per_image": 1000},
    )
    report = load_detector(model, config, VOC_CLASSES, path, "match")
    assert (report.loaded, report.missing, report.unexpected, report.remark) == (40, [], [], "")

    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(2)) * 255
    image = F.interpolate(coarse, size=SIZE, mode="bilinear")[0].to(torch.uint8)
    expected = original_detections(state, image)
    ours = model([image])[0][0]
    assert len(expected) >= 10 and len({label for _, label, _ in expected}) >= 3
    torch.testing.assert_close(ours["scores"], torch.tensor([score for score, _, _ in expected]), rtol=0, atol=1e-4)
    # Classes one after the other: rounding may order nearly equal scores of two classes otherwise.
    expected.sort(key=lambda found: found[1])
    order = ours["labels"].argsort(stable=True)
    assert ours["labels"][order].tolist() == [label + 1 for _, label, _ in expected]
    yxyx = ours["boxes"][order][:, [1, 0, 3, 2]]
    torch.testing.assert_close(yxyx, torch.tensor([box for _, _, box in expected]), rtol=0, atol=1e-3)


def test_chenyuntcs_detector_with_dropout_has_another_index(tmp_path: Path) -> None:
    state = {name.replace("classifier.2", "classifier.3"): tensor for name, tensor in chenyuntc_state().items()}
    torch.save(state, tmp_path / "weights.pth")
    model, config = build({"name": "vgg16", "weights": "file", "pool_size": 2}, 20, anchors={})
    assert load_detector(model, config, VOC_CLASSES, tmp_path / "weights.pth", "match").missing == []
    wrong, config = build({"name": "vgg16", "weights": "file", "pool_size": 1}, 20, anchors={}, rpn={"conv_depth": 3})
    with pytest.raises(InputError, match=r" backbone\.pool_size 2 \(is 1\), rpn\.conv_depth 1 \(is 3\)"):
        load_detector(wrong, config, VOC_CLASSES, tmp_path / "weights.pth", "match")
