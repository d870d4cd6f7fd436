"""`frcnn benchmark train|infer`: both detectors compute the same, the parts are the step, and the report is right."""

import json
import multiprocessing
import os
import time
from dataclasses import replace
from operator import truediv
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig
from detector.faster_rcnn import FasterRCNN
from detector.kernels import processor
from experiments.benchmark import devices as benchmark_devices
from experiments.benchmark import memory as benchmark_memory
from experiments.benchmark import network as benchmark_network
from experiments.benchmark import programs as benchmark_programs
from experiments.benchmark.cases import Case
from experiments.benchmark.devices import time_steps
from experiments.benchmark.memory import StepMemory
from experiments.benchmark.models import (
    CANDIDATES,
    Batch,
    NetworkOptions,
    build_network,
    chosen_networks,
    make_images,
    standard_options,
)
from experiments.benchmark.processes import ProcessFailed, run_processes
from experiments.benchmark.programs import Setting, autocast, our_optimizer
from experiments.benchmark.step_parts import training_parts
from experiments.benchmark.sweep import growth, with_scales
from experiments.benchmark.torchvision_peer import build_peer

CPU = torch.device("cpu")
SIZE = (96, 160)
HUGE = 10**6
FIRST_CONVOLUTION = {
    "vgg16": ("backbone.0.weight", "backbone.body.features.0.weight"),
    "resnet18_fpn": ("backbone.body.conv1.weight", "backbone.body.conv1.weight"),
    "mobilenet_v2_fpn": ("backbone.body.0.0.weight", "backbone.body.features.0.0.weight"),
    "mobilenet_v2_c4": ("backbone.0.0.weight", "backbone.body.features.0.0.weight"),
}
Pair = tuple[str, FasterRCNN, TorchvisionFasterRCNN, Batch]


def small_options(name: str) -> NetworkOptions:
    """All anchors and proposals are sampled, so that nothing is random."""
    options = standard_options(name, SIZE)
    width = 64 if name.endswith("fpn") else None
    backbone = replace(options.backbone, dropout=0.0, box_head_channels=width)
    if name == "vgg16":  # without a file of half a gigabyte
        backbone = replace(backbone, weights="none", frozen_stages=0, norm="batch")
    return replace(
        options,
        backbone=backbone,
        rpn=replace(options.rpn, samples_per_image=HUGE, positive_fraction=1.0, post_nms_train=100, post_nms_test=200),
        roi=replace(options.roi, samples_per_image=HUGE, positive_fraction=1.0),
    )


@pytest.fixture(scope="module", params=list(FIRST_CONVOLUTION))
def pair(request) -> Pair:
    """Name, ours and torchvision's, and two images."""
    options = small_options(request.param)
    batch = make_images(options.size, 2, 4, CPU)
    model, backbone = build_network(options, batch)
    return request.param, model, build_peer(model, backbone), batch


def test_weights_are_the_same(pair: Pair) -> None:
    name, model, peer, _ = pair
    theirs, ours = peer.state_dict(), model.state_dict()
    first_theirs, first_ours = FIRST_CONVOLUTION[name]
    names = {
        first_theirs: first_ours,
        "rpn.head.conv.0.0.weight": "rpn.head.conv.weight",
        "rpn.head.cls_logits.bias": "rpn.head.objectness.bias",
        "rpn.head.bbox_pred.weight": "rpn.head.deltas.weight",
        "roi_heads.box_predictor.cls_score.bias": "roi_heads.predictor.scores.bias",
    }
    for their_name, our_name in names.items():
        assert torch.equal(theirs[their_name], ours[our_name])
    assert torch.equal(
        theirs["roi_heads.box_predictor.bbox_pred.weight"][4:], ours["roi_heads.predictor.deltas.weight"]
    )
    background = 4 * (theirs["roi_heads.box_predictor.bbox_pred.weight"].shape[1] + 1)

    def trained(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)

    assert trained(peer) == trained(model) + background
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert trained(model) == everything if name == "vgg16" else 0 < trained(model) < everything


def test_detections_are_the_same(pair: Pair) -> None:
    _, model, peer, (images, _) = pair
    with torch.inference_mode():
        ours = model.eval()(images)[0]
        theirs = peer.eval()([image.float() / 255 for image in images])
    for our, their in zip(ours, theirs, strict=True):
        assert len(our["boxes"]) > 5
        assert len(our["boxes"]) == pytest.approx(len(their["boxes"]), abs=1)
        # Sums in another order let a few candidates fall on the other side of a threshold.
        same = (box_iou(our["boxes"], their["boxes"]) > 0.99) & (our["labels"][:, None] == their["labels"])
        same &= (our["scores"][:, None] - their["scores"]).abs() < 1e-3
        assert same.any(dim=1).float().mean() >= 0.95


def test_losses_are_the_same(pair: Pair) -> None:
    _, model, peer, (images, targets) = pair
    with torch.no_grad():
        ours = model.train().losses(images, targets)
        theirs = peer.train()([image.float() / 255 for image in images], targets)
    for our_name, their_name in (
        ("loss_rpn_cls", "loss_objectness"),
        ("loss_rpn_reg", "loss_rpn_box_reg"),
        ("loss_roi_cls", "loss_classifier"),
        ("loss_roi_reg", "loss_box_reg"),
    ):
        assert ours[our_name].item() == pytest.approx(theirs[their_name].item(), rel=0.01), our_name
    assert ours["loss"].item() == pytest.approx(sum(loss.item() for loss in theirs.values()), rel=0.005)


@pytest.mark.parametrize("pair", ["resnet18_fpn", "mobilenet_v2_c4"], indirect=True)
def test_parts_of_a_step_give_its_gradients(pair: Pair) -> None:
    _, model, _, (images, targets) = pair
    model.train().zero_grad()
    model.losses(images, targets)["loss"].backward()
    whole = {n: parameter.grad.clone() for n, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    times = training_parts(model, images, targets, our_optimizer(model), autocast("32-true", CPU))
    parts = {n: parameter.grad for n, parameter in model.named_parameters() if parameter.grad is not None}
    assert parts.keys() == whole.keys()
    assert len(whole) == sum(parameter.requires_grad for parameter in model.parameters())
    for n, gradient in whole.items():
        torch.testing.assert_close(parts[n], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-9)
    assert len(times) == 9
    assert min(times.values()) > 0


def test_candidates_are_as_many_as_of_a_trained_detector() -> None:
    options = standard_options("mobilenet_v2_fpn", SIZE)
    options = replace(options, backbone=replace(options.backbone, box_head_channels=64))
    images, _ = batch = make_images(options.size, 1, 6, CPU)
    model = build_network(options, batch)[0]
    with torch.no_grad():
        features, image_batch = model.features(images)
        logits, _ = model.roi_heads(features, model.proposals(features, image_batch))
    found = (logits.softmax(dim=1)[:, 1:] > 0.05).sum().item()
    assert found == pytest.approx(CANDIDATES, rel=0.05)


def test_images_and_targets() -> None:
    images, targets = make_images((96, 160), 2, 30, CPU)
    assert [image.shape for image in images] == [(3, 96, 160)] * 2
    assert all(image.dtype == torch.uint8 for image in images)
    assert not torch.equal(images[0], images[1])
    for target in targets:
        x1, y1, x2, y2 = target["boxes"].T
        assert len(target["boxes"]) == len(target["labels"]) == 30
        assert (x1 >= 0).all() and (x2 > x1).all() and (x2 <= 160).all()
        assert (y1 >= 0).all() and (y2 > y1).all() and (y2 <= 96).all()
        assert x2.max() > 96


def test_options_of_an_experiment(tiny_config) -> None:
    options = ["model.rpn.post_nms_train=7", "model.image.shortest_side=[72]"]
    ((name, chosen),) = chosen_networks(None, str(tiny_config), options)
    assert (name, chosen.size, chosen.rpn.post_nms_train) == ("tiny", (72, 96), 7)
    assert (chosen.anchors.scales, chosen.roi.samples_per_image) == ([1.0, 2.0], 16)


def test_sizes_of_named_networks() -> None:
    ((_, own),) = chosen_networks(["vgg16"], None)
    ((_, given),) = chosen_networks(["vgg16"], None, size=[600, 1000])
    assert (own.size, own.image.longest_side) == ((600, 800), 800)
    assert (given.size, given.image.longest_side, given.image.shortest_side) == ((600, 1000), 1000, [600])


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_report(frcnn, tmp_path, monkeypatch, tiny_config, kind: str) -> None:
    """Of a network that torchvision has too, with memory as if each image took 256 MB, and torchvision's 512; as on a
    processor with bfloat16."""
    monkeypatch.setattr(processor, "cpu_flags", lambda: {"avx2", "avx512_f", "avx512_bf16"})
    monkeypatch.setattr(
        benchmark_memory,
        "run_processes",
        lambda function, arguments, seconds: [100 + 256 * args[1] * (2 if args[3] else 1) for args in arguments],
    )
    network = "model.backbone.name=mobilenet_v2_c4", "model.backbone.norm=batch", "model.rpn.post_nms_train=20"
    options = [word for option in network for word in ("--option", option)]
    run = ("--config", tiny_config, *options, "--repeats", 1, "--batch_sizes", "[3]", "--format", "json")
    result = frcnn("benchmark", kind, *run, cwd=tmp_path)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert {"device", "versions", "cases"} <= document.keys()
    assert document["versions"].keys() >= {"torch", "torchvision", "python"}
    assert "1 threads" in document["device"] or "cuda" in document["device"]
    assert [(case["name"], case["peer"]) for case in document["cases"]] == [
        ("tiny 64x85, batch 3, 32-true", "torchvision"),
        ("tiny 64x85, batch 3, bf16-mixed", "torchvision"),
        ("tiny 64x85, batch 3, bf16-mixed", "torchvision in 32-true"),
    ]
    for case in document["cases"]:
        assert {"name", "ours_ms", "peer_ms", "ratio", "parts"} <= case.keys()
        assert case["ratio"] == pytest.approx(case["peer_ms"] / case["ours_ms"])
        assert case["ours_per_s"] == pytest.approx(3000 / case["ours_ms"])
        assert case["peer_per_s"] == pytest.approx(3000 / case["peer_ms"])
        if torch.cuda.is_available():
            continue
        assert (case["ours_peak_mb"], case["mb_per_image"], case["images_per_gib"]) == (868, 256, 4)
        assert (case["peer_peak_mb"], case["peer_mb_per_image"], case["peer_images_per_gib"]) == (1636, 512, 2)
    shares = [case["parts"] for case in document["cases"] if case["parts"]]
    assert len(shares) == 2
    for parts in shares:
        assert sum(parts.values()) == pytest.approx(1.0)
        assert {"backbone", "rpn head", "proposals and NMS", "RoI pooling", "box head"} < parts.keys()
        assert ("optimiser" in parts) == (kind == "train")
        assert ("detections and NMS" in parts) == (kind == "infer")


def test_precisions_that_the_device_emulates(frcnn, tmp_path, monkeypatch, tiny_config, caplog) -> None:
    """They are left out unless asked for, and then one line says what they cost."""
    monkeypatch.setattr(processor, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(benchmark_programs, "this_device", lambda: CPU)
    monkeypatch.setattr(benchmark_network, "this_device", lambda: CPU)
    run = ("benchmark", "infer", "--config", tiny_config, "--repeats", 1, "--batch_sizes", "[1]", "--peer", "none")
    for given, timed in (((), ["32-true"]), (("--precisions", "[32-true, 16-mixed]"), ["32-true", "16-mixed"])):
        caplog.clear()
        result = frcnn(*run, *given, "--no-memory", "--format", "json", cwd=tmp_path)
        assert result.code == 0, result.err
        names = [case["name"] for case in json.loads(result.out)["cases"]]
        assert names == [f"tiny 64x85, batch 1, {precision}" for precision in timed]
        lines = [line for line in caplog.messages if "float16" in line]
        assert len(lines) == len(timed) - 1
    assert lines[0].startswith("warning: precision 16-mixed is slow here: this CPU has no float16 arithmetic")
    assert lines[0].endswith("Better: --precisions 32-true")


def test_memory_of_a_step(tiny_config) -> None:
    """More than weights, gradients and momentum, each 4 bytes per weight; less than what torch itself takes."""
    ((_, options),) = chosen_networks(None, str(tiny_config), ["model.backbone.box_head_channels=4000"])
    weights = sum(p.numel() for p in build_network(options, make_images(options.size, 1, 2, CPU))[0].parameters())
    meter = StepMemory(options, Setting("train", CPU, 1), 250)
    meter.known[2, "32-true", False] = 500.0
    peak = meter.peak(1, "32-true", False)
    assert peak is not None
    assert 3 * 4 * weights / 2**20 < peak < 3 * 4 * weights / 2**20 + 150
    assert meter.per_image("32-true", False) == 500 - peak


@pytest.mark.gpu
def test_memory_of_a_step_on_a_gpu(tiny_config) -> None:
    ((_, options),) = chosen_networks(None, str(tiny_config))
    meter = StepMemory(options, Setting("train", torch.device("cuda"), 1), 250)
    few, many = (meter.peak(number, "32-true", False) for number in (1, 8))
    assert few is not None and many is not None
    assert 0 < few < many
    assert torch.cuda.memory_allocated() < few * 2**20


@pytest.mark.parametrize(
    ("kind", "sweep", "values", "images", "words"),
    [
        ("train", "objects", [1, 3, 10, 30, 100, 300], 2, "300 times the objects (1 to 300): "),
        ("infer", "anchors", [9, 15, 30, 45, 60], 2, "6.67 times the anchors per location (9 to 60): "),
        ("train", "batch_size", [1, 2], None, "2 times the images (1 to 2): "),
    ],
)
def test_sweep(frcnn, tmp_path, tiny_config, kind: str, sweep: str, values: list[int], images: int, words: str) -> None:
    batch_sizes = values if images is None else [images]
    run = ("--config", tiny_config, "--repeats", 1, "--batch_sizes", batch_sizes, "--format", "json")
    result = frcnn("benchmark", kind, *run, "--sweep", sweep, "--plot", tmp_path / "new" / "sweep.svg", cwd=tmp_path)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [case["value"] for case in document["cases"]] == values
    for case in document["cases"]:
        number = case["value"] if images is None else images
        assert f"batch {number}, 32-true" in case["name"]
        assert case["ours_per_s"] == pytest.approx(1000 * number / case["ours_ms"])
        assert sum(case["parts"].values()) == pytest.approx(1.0)
        network = case["parts"]["backbone"] + case["parts"]["box head"]
        assert case["detector_ms"] > 0
        assert 0 < network < 1
    (note,) = document["notes"]
    assert words in note
    assert (tmp_path / "new" / "sweep.svg").read_text().count("<svg") == 1


def test_scales_of_a_sweep() -> None:
    flat = with_scales(AnchorConfig(scales=[8, 16, 32], base_size=16), 3)
    assert flat.aspect_ratios == [0.5, 1, 2]
    assert flat.scales == pytest.approx([2, 8, 32])
    levels = with_scales(AnchorConfig(scales=[[32], [64, 96]], base_size=1), 4)
    assert levels.scales[0] == pytest.approx([32, 32 * 2**0.25, 32 * 2**0.5, 32 * 2**0.75])
    assert levels.scales[1] == pytest.approx([64, 64 * 2**0.25, 64 * 2**0.5, 64 * 2**0.75])


def test_growth_in_words() -> None:
    cases = [
        Case("a", 100, None, ours_per_s=10, detector_ms=20, value=1),
        Case("b", 350, None, ours_per_s=11.4, detector_ms=50, value=4),
    ]
    assert growth("vgg16", cases, "objects") == (
        "vgg16: 4 times the objects (1 to 4): 2.50 times the time of the detector's own parts (20.0 to 50.0 ms)"
    )
    assert "1.14 times the images per second (10 to 11.4)" in growth("vgg16", cases, "batch_size")


def test_steps_of_two_processes(tiny_config, tmp_path) -> None:
    ((_, options),) = chosen_networks(None, str(tiny_config))
    setting = Setting("train", CPU, 3)
    arguments = [(rank, 2, str(tmp_path / "store"), options, 1, "32-true", setting, 250.0) for rank in range(2)]
    times = run_processes(time_steps, arguments, 250)
    assert [len(steps) for steps in times] == [3, 3]
    assert min(map(min, times)) > 0


def test_efficiency_of_devices(frcnn, tmp_path, monkeypatch, tiny_config) -> None:
    """As if a step took 100 ms alone, and beside another 110, 120 or 130 ms in one and 125 ms in the other process."""
    monkeypatch.setattr(benchmark_devices, "this_device", lambda: CPU)
    steps = {1: [[100.0, 100.0, 100.0]], 2: [[110.0, 120.0, 130.0], [125.0, 125.0, 125.0]]}
    monkeypatch.setattr(benchmark_devices, "run_processes", lambda function, arguments, seconds: steps[len(arguments)])
    run = ("--config", tiny_config, "--devices", "2", "--batch_sizes", "[4]", "--format", "json")
    result = frcnn("benchmark", "train", *run, cwd=tmp_path)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    alone, both = document["cases"]
    assert (alone["value"], alone["ours_ms"], alone["ours_per_s"], alone["efficiency"]) == (1, 100, 40, 1)
    assert (both["value"], both["ours_ms"], both["ours_per_s"]) == (2, 125, 64)
    assert both["efficiency"] == pytest.approx(0.8)
    assert "1.60 times the images per second of one (40 to 64), efficiency 0.80" in document["notes"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the devices are then GPUs")
def test_processes_that_take_too_long(frcnn, tmp_path, tiny_config) -> None:
    run = ("--config", tiny_config, "--devices", "1,2", "--time_limit", 0.2)
    result = frcnn("benchmark", "train", *run, cwd=tmp_path)
    assert result.code == 1
    assert result.err == "frcnn benchmark train: process 1 of 1 took longer than 0.2 s\n"


def test_processes_return_in_order() -> None:
    assert run_processes(truediv, [(6, 3), (8, 2)], 100) == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "seconds", "words"),
    [
        ([(100,), (-1,)], 200, "process 2 of 2 failed: ValueError: sleep length must be non-negative"),
        ([(100,), (0,)], 2, "process 1 of 2 took longer than 2 s"),
    ],
)
def test_a_failing_process_ends_all(arguments: list[tuple[int]], seconds: float, words: str) -> None:
    with pytest.raises(ProcessFailed, match=words):
        run_processes(time.sleep, arguments, seconds)
    assert multiprocessing.active_children() == []  # also those that had 100 s to sleep


@pytest.mark.parametrize(
    ("function", "own", "words"),
    [
        (os._exit, (3,), "process 1 of 1 ended with exit status 3"),
        (os.abort, (), "process 1 of 1 was ended by signal SIGABRT"),
    ],
)
def test_a_process_that_dies(function, own: tuple[int, ...], words: str) -> None:
    with pytest.raises(ProcessFailed) as failure:
        run_processes(function, [own], 200)
    assert str(failure.value) == words


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--networks", "[vgg99]"], "vgg99"),
        (["train", "--repeats", "0"], "--repeats 0"),
        (["infer", "--batch_sizes", "[0]"], "[0]"),
        (["infer", "--precisions", "[8-bit]"], "8-bit"),
        (["train", "--option", "model.rpn.nms_iou=0.5"], "--config"),
        (["train", "--networks", "[vgg16]", "--config", "x.yaml"], "--networks and --config"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--size", "[600]"], "--size [600]"),
        (["train", "--size", "[600, 20]"], "at least 64"),
        (["train", "--config", "TINY", "--size", "[600, 600]"], "--size"),
        (["train", "--config", "TINY"], "small_c4"),
        (["train", "--config", "TINY", "--option", "model.rpn.nms_iou=7"], "nms_iou"),
        (["infer", "--sweep", "objects"], "--sweep objects"),
        (["train", "--sweep", "colours"], "colours"),
        (["train", "--plot", "a.png"], "--sweep"),
        (["train", "--sweep", "anchors", "--plot", "a.txt"], "a.txt"),
        (["train", "--sweep", "anchors", "--devices", "2"], "--sweep and --devices"),
        (["train", "--devices", "0,2"], "--devices 0,2"),
        (["train", "--devices", "two"], "'two'"),
        (["infer", "--devices", "2"], "--devices"),
        (["train", "--time_limit", "0"], "--time_limit 0"),
    ],
)
def test_bad_usage(frcnn, tmp_path, tiny_config: Path, arguments: list[str], named: str) -> None:
    result = frcnn("benchmark", *(str(tiny_config) if word == "TINY" else word for word in arguments), cwd=tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert named in result.err
    assert result.out == ""
