"""`frcnn benchmark train|infer`: the report is right, and bad usage is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.kernels import processor
from experiments.benchmark import memory as benchmark_memory
from experiments.benchmark import programs as benchmark_programs
from experiments.benchmark.measuring import CPU


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


def test_tensor_float_32_is_of_its_programs_alone() -> None:
    kinds: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    seen: dict[str, list[bool]] = {}
    for precision in ("tf32", "bf16-mixed"):

        def forward(name: str = precision) -> None:
            seen[name] = [kind.allow_tf32 for kind in kinds]

        benchmark_programs.program(forward, None, precision, CPU)()
    assert seen == {"tf32": [True, True], "bf16-mixed": before}
    assert [kind.allow_tf32 for kind in kinds] == before and not before[0]


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
        (["train", "--sweep", "anchors", "--devices", "2"], "--sweep, --devices and --callbacks: give one of them"),
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
