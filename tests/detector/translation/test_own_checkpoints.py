"""A checkpoint as a start for a training on other classes, with other boxes or anchors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from detector.anchors import AnchorConfig, AnchorShapes
from detector.backbones.base import BackboneConfig
from detector.boxes import BoxCoder
from detector.errors import InputError
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.training.lightning_module import FasterRCNNModule

SMALL: dict[str, Any] = {"name": "small_c4", "weights": "none", "frozen_stages": 0, "pool_size": 2}
OLD = ["bird", "cat", "dog"]
RANDOM = "predictor left at random"


def module(classes: list[str], seed: int = 1, backbone: Any = (), **options: Any) -> FasterRCNNModule:
    torch.manual_seed(seed)
    config = BackboneConfig(**SMALL | {"box_head_channels": 16} | dict(backbone))
    return FasterRCNNModule(
        classes,
        config,
        AnchorConfig(**{"scales": [1, 2], "aspect_ratios": [0.5, 1, 3]} | options.pop("anchors", {})),
        RPNConfig(**options.pop("rpn", {})),
        RoIConfig(**options.pop("roi", {})),
        **options,
    )


@pytest.fixture(scope="module")
def trained_module() -> FasterRCNNModule:
    """A detector of which every tensor is random."""
    made = module(OLD, roi={"delta_std": [0.1, 0.1, 0.2, 0.2]})
    for tensor in made.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    return made


def save(made: FasterRCNNModule, folder: Path, name: str = "last.ckpt") -> Path:
    path = folder / name
    content = {
        "state_dict": made.state_dict(),
        "current_model_state": {key: torch.zeros_like(value) for key, value in made.state_dict().items()},
        "hyper_parameters": dict(made.hparams),
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(trained_module: FasterRCNNModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(trained_module, tmp_path_factory.mktemp("own"))


def start(path: Path, classes: list[str], predictor: Any, **options: Any) -> FasterRCNNModule:
    return module(classes, 2, weights=str(path), weights_predictor=predictor, **options)


def weight(made: FasterRCNNModule, name: str) -> Tensor:
    return made.state_dict()[f"model.{name}"]


def test_classes_of_the_same_name(trained_module: FasterRCNNModule, checkpoint: Path) -> None:
    """Of [dog, fox, bird] the third and the first of [bird, cat, dog] are taken; fox is as a new detector has it."""
    ours, new = start(checkpoint, ["dog", "fox", "bird"], "by_name"), module(["dog", "fox", "bird"], 2)
    for kind in ("weight", "bias"):
        theirs, mine, fresh = (weight(m, f"roi_heads.predictor.scores.{kind}") for m in (trained_module, ours, new))
        assert torch.equal(mine[[0, 1, 3]], theirs[[0, 3, 1]])
        assert torch.equal(mine[2], fresh[2])
        theirs, mine, fresh = (
            weight(m, f"roi_heads.predictor.deltas.{kind}").unflatten(0, (-1, 4)) for m in (trained_module, ours, new)
        )
        assert torch.allclose(mine[[0, 2]], theirs[[2, 0]])
        assert torch.equal(mine[1], fresh[1])
    for name, tensor in trained_module.model.state_dict().items():
        if "predictor" not in name:
            assert torch.equal(weight(ours, name), tensor), name
    assert ours.weights_report is not None
    assert ours.weights_report.remark == "2 of the data's 3 classes, by name; at random: fox"


@pytest.mark.parametrize(
    ("classes", "predictor", "remark"),
    [
        (["dog", "bird", "cat"], "match", ""),
        (["dog"], "match", "1 of its 3 classes, by name"),
        (
            ["ant", "bee", "cow"],
            "match",
            f"{RANDOM}: not all of the data's classes are among the file's 3",
        ),
        (["dog", "bird", "cat"], "random", f"{RANDOM}: as asked for"),
        (["ant"], "by_name", f"{RANDOM}: none of the data's classes is among the file's 3"),
    ],
)
def test_which_rows_are_taken(
    trained_module: FasterRCNNModule, checkpoint: Path, classes: list[str], predictor: str, remark: str
) -> None:
    """As many classes of other names are other classes."""
    ours, new = start(checkpoint, classes, predictor), module(classes, 2)
    scores = "roi_heads.predictor.scores.weight"
    if "random" in remark:
        assert torch.equal(weight(ours, scores), weight(new, scores))
    else:
        rows = [0, *(1 + OLD.index(name) for name in classes)]
        assert torch.equal(weight(ours, scores), weight(trained_module, scores)[rows])
    assert ours.weights_report is not None
    assert ours.weights_report.remark == remark


@pytest.mark.parametrize("file_agnostic", [True, False])
@pytest.mark.parametrize("agnostic", [True, False])
def test_boxes_of_all_classes_and_of_each(tmp_path: Path, file_agnostic: bool, agnostic: bool) -> None:
    """Boxes of no class fit each; those of classes are none of all. Deltas keep their meaning under other units."""
    file = module(OLD, roi={"class_agnostic": file_agnostic, "delta_mean": [0.5, 0, 0, 0]})
    torch.nn.init.normal_(file.model.roi_heads.predictor.deltas.bias)
    path = save(file, tmp_path)
    roi = {"class_agnostic": agnostic, "delta_std": [0.2, 0.1, 0.2, 0.1]}
    ours, new = start(path, ["fox", "cat"], "by_name", roi=roi), module(["fox", "cat"], 2, roi=roi)
    theirs, mine, fresh = (
        weight(m, "roi_heads.predictor.deltas.bias").unflatten(0, (-1, 4)) for m in (file, ours, new)
    )
    real = theirs * torch.tensor([0.1, 0.1, 0.2, 0.2]) + torch.tensor([0.5, 0, 0, 0])
    expected = fresh * torch.tensor(roi["delta_std"])
    if file_agnostic:
        expected[:] = real[0]
    elif not agnostic:
        expected[1] = real[1]  # the cat
    assert torch.allclose(mine * torch.tensor(roi["delta_std"]), expected, atol=1e-7)
    assert ours.weights_report is not None
    assert ("boxes of the predictor at random" in ours.weights_report.remark) == (agnostic and not file_agnostic)


@pytest.mark.parametrize(
    ("anchors", "rpn"),
    [
        ({"order": "scale_major"}, {}),
        ({"aspect_ratios": [3, 0.5, 1], "scales": [2, 1]}, {"objectness": "softmax"}),
    ],
)
def test_rpn_rows_follow_their_anchors(tmp_path: Path, anchors: dict[str, Any], rpn: dict[str, Any]) -> None:
    """The same image has the same proposals, whatever the order of the anchors."""
    images = [torch.randint(0, 255, (3, 64, 80), generator=torch.Generator().manual_seed(0)).float()]
    for first, second in (({}, {"anchors": anchors, "rpn": rpn}), ({"anchors": anchors, "rpn": rpn}, {})):
        file = module(OLD, **first)
        for layer in (file.model.rpn.head.objectness, file.model.rpn.head.deltas):
            torch.nn.init.normal_(layer.weight, std=0.1)
        ours = start(save(file, tmp_path), OLD, "match", **second)
        with torch.no_grad():
            (theirs,), (mine,) = (m.eval().model(images)[1] for m in (file, ours))
        assert len(theirs) > 10
        assert torch.allclose(mine, theirs, atol=1e-3)
        assert ours.weights_report is not None
        assert ours.weights_report.remark == ""


def test_other_numbers_of_anchors_and_another_box_head_are_left_at_random(checkpoint: Path) -> None:
    options: dict[str, Any] = {"anchors": {"scales": [1, 2, 4]}, "backbone": {"box_head_channels": 24}}
    ours = start(checkpoint, OLD, "match", **options)
    assert ours.weights_report is not None
    missing = ours.weights_report.missing
    assert {name for name in missing if name.startswith("rpn.")} == {
        f"rpn.head.{layer}.{kind}" for layer in ("objectness", "deltas") for kind in ("weight", "bias")
    }
    assert not any(name.startswith("backbone.") for name in missing)
    assert "RPN's outputs left at random: 6 anchors per location there, 9 here" in ours.weights_report.remark
    assert "the file's box head has another width" in ours.weights_report.remark


@pytest.mark.parametrize(
    ("theirs", "ours", "taken"),
    [([[1], [2, 3]], [[1], [2, 3]], True), ([[1], [2, 3]], [[1], [2, 4]], False), ([1, 2], [[1], [2, 3]], False)],
    ids=["the same", "another scale", "no lists per level"],
)
def test_numbers_of_anchors_that_differ_between_levels(
    tmp_path: Path, theirs: list[Any], ours: list[Any], taken: bool
) -> None:
    backbone = {"name": "resnet18_fpn", "norm": "batch", "pool_size": 7, "fpn_channels": 8}

    def anchors(scales: list[Any]) -> dict[str, Any]:
        return {"scales": [*scales, *[[4]] * 3] if isinstance(scales[0], list) else scales, "aspect_ratios": [1]}

    file = module(OLD, 1, backbone, anchors=anchors(theirs))
    started = start(save(file, tmp_path), OLD, "match", backbone=backbone, anchors=anchors(ours))
    assert started.weights_report is not None
    outputs = {name for name in started.weights_report.missing if "rpn.head" in name}
    assert outputs == (
        set()
        if taken
        else {f"rpn.head.{a}.{n}.{b}" for a in ("objectness", "deltas") for n in (1, 2) for b in ("weight", "bias")}
    )
    assert torch.equal(weight(started, "rpn.head.conv.weight"), weight(file, "rpn.head.conv.weight"))
    assert ("their levels have other anchors" in started.weights_report.remark) is not taken
    if taken:
        assert torch.equal(weight(started, "rpn.head.deltas.2.weight"), weight(file, "rpn.head.deltas.2.weight"))


def test_files_of_weights_alone(trained_module: FasterRCNNModule, tmp_path: Path) -> None:
    """Names of classes are not in them: as many classes match, and none is found by name."""
    tensors = {name: tensor.contiguous() for name, tensor in trained_module.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(trained_module.model.state_dict(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        ours = start(tmp_path / name, ["x", "y", "z"], "match")
        for key, tensor in trained_module.model.state_dict().items():
            assert torch.allclose(weight(ours, key), tensor), key
        with pytest.raises(InputError, match="does not name its 3 classes"):
            start(tmp_path / name, OLD, "by_name")


def test_what_cannot_begin_a_training(trained_module: FasterRCNNModule, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"is of another backbone, small_c4: backbone\.\S+ .* give the options of backbone"
    ):
        start(checkpoint, OLD, "match", backbone={"name": "resnet18_fpn"})
    with pytest.raises(InputError, match="choose one of match, random, by_name"):
        start(checkpoint, OLD, "some")
    with pytest.raises(InputError, match=r"last\.ckpt: give a checkpoint of frcnn fit.* by the key weights"):
        module(OLD, backbone={"weights": str(checkpoint)})
    two_networks = module(OLD, training_scheme="alternating")
    with pytest.raises(InputError, match="up to the end of step 2 there is no single network"):
        start(save(two_networks, tmp_path), OLD, "match")
    state = trained_module.state_dict()
    bad = {name: tensor.clone() for name, tensor in state.items()}
    bad["model.rpn.head.conv.bias"][3] = torch.nan
    torch.save({"state_dict": bad}, tmp_path / "nan.ckpt")
    with pytest.raises(InputError, match=r"nan\.ckpt: its weights are not finite, first model\.rpn\.head\.conv\.bias"):
        start(tmp_path / "nan.ckpt", OLD, "match")


CASCADE: dict[str, Any] = {"class_agnostic": True, "cascade_ious": [0.5, 0.6, 0.7]}


def test_each_stage_of_a_cascade_follows_its_classes_and_units(tmp_path: Path) -> None:
    """Of [bird, cat, dog] to [dog, bird], with deltas in units of 0.1, 0.05 and 0.033 to those of twice as much."""
    theirs = module(OLD, roi=CASCADE)
    for tensor in theirs.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    path = save(theirs, tmp_path)
    ours = start(path, ["dog", "bird"], "by_name", roi=CASCADE | {"delta_std": [0.2, 0.2, 0.4, 0.4]})
    for prefix in ("", "later.0.", "later.1."):
        name = f"roi_heads.{prefix}predictor.scores.weight"
        assert torch.equal(weight(ours, name), weight(theirs, name)[[0, 3, 1]])
        name = f"roi_heads.{prefix}predictor.deltas.bias"
        torch.testing.assert_close(weight(ours, name), weight(theirs, name) / 2)
        name = f"roi_heads.{prefix}box_head.fc2.weight"
        assert torch.equal(weight(ours, name), weight(theirs, name))


def test_a_cascade_begins_with_one_stage_of_a_detector_without(
    trained_module: FasterRCNNModule, checkpoint: Path
) -> None:
    """Its boxes are of classes, so the cascade's are new; the way back takes the first stage."""
    ours, new = start(checkpoint, OLD, "match", roi=CASCADE), module(OLD, 2, roi=CASCADE)
    for prefix in ("", "later.0.", "later.1."):
        for name in ("box_head.fc1.weight", "predictor.scores.weight", "predictor.scores.bias"):
            assert torch.equal(weight(ours, f"roi_heads.{prefix}{name}"), weight(trained_module, f"roi_heads.{name}"))
        name = f"roi_heads.{prefix}predictor.deltas.weight"
        assert torch.equal(weight(ours, name), weight(new, name))


def test_a_detector_begins_with_the_first_stage_of_a_cascade(tmp_path: Path) -> None:
    theirs = module(OLD, roi=CASCADE)
    ours = start(save(theirs, tmp_path), OLD, "match", roi={"class_agnostic": True})
    for name in ("box_head.fc1.weight", "predictor.scores.weight", "predictor.deltas.weight"):
        assert torch.equal(weight(ours, f"roi_heads.{name}"), weight(theirs, f"roi_heads.{name}"))


# ---- boxes and anchors of one's own ----


@dataclass
class Sides(BoxCoder):
    unit: float = 16.0

    def encode(self, boxes: Tensor, references: Tensor) -> Tensor:
        return (boxes - references) / self.unit

    def decode(self, deltas: Tensor, references: Tensor) -> Tensor:
        return deltas * self.unit + references


class Two(AnchorShapes):
    def __call__(self, level: int) -> Tensor:
        return torch.tensor([[-8.0, -8, 8, 8], [-16, -8, 16, 8]])


@pytest.mark.parametrize(
    ("theirs", "ours", "same"), [(Sides(), Sides(), True), (Sides(), Sides(8.0), False), ("deltas", Sides(), False)]
)
def test_boxes_are_taken_over_under_the_same_coder(tmp_path: Path, theirs: Any, ours: Any, same: bool) -> None:
    file = module(OLD, rpn={"coder": theirs}, roi={"coder": theirs})
    for layer in ("roi_heads.predictor", "rpn.head"):
        torch.nn.init.normal_(file.model.get_parameter(f"{layer}.deltas.bias"))
    options = {"coder": ours}
    made = start(save(file, tmp_path), OLD, "match", rpn=dict(options), roi=options | {"delta_std": [1.0] * 4})
    new = module(OLD, 2, rpn=dict(options), roi=options)
    for layer in ("roi_heads.predictor", "rpn.head"):
        expected = file if same else new
        assert torch.equal(weight(made, f"{layer}.deltas.bias"), weight(expected, f"{layer}.deltas.bias"))
    assert torch.equal(
        weight(made, "roi_heads.predictor.scores.weight"), weight(file, "roi_heads.predictor.scores.weight")
    )
    assert made.weights_report is not None
    reasons = ("the file's are of another roi.coder", "the file's are of another rpn.coder")
    assert [reason in made.weights_report.remark for reason in reasons] == [not same] * 2


def test_anchors_of_ones_own_are_the_same_ones(tmp_path: Path) -> None:
    file = module(OLD, anchors={"generator": Two()})
    torch.nn.init.normal_(file.model.rpn.head.get_parameter("objectness.bias"))
    made = start(save(file, tmp_path), OLD, "match", anchors={"generator": Two()})
    assert torch.equal(weight(made, "rpn.head.objectness.bias"), weight(file, "rpn.head.objectness.bias"))
    assert made.weights_report is not None and made.weights_report.remark == ""
