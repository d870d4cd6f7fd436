"""`frcnn benchmark evaluate` on a few images."""

import json

import pytest
import torch

from experiments.benchmark.metrics import random_split


@pytest.mark.timeout(300)
def test_keys_and_ratios(frcnn_process, tmp_path) -> None:
    size = ("--images", 12, "--detections", 10, "--repeats", 2)
    process = frcnn_process("benchmark", "evaluate", *size, "--format", "json", cwd=tmp_path)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert {"device", "versions", "cases"} <= document.keys()
    assert document["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [case["name"] for case in document["cases"]] == ["VOC", "VOC + COCO + proposal recall"]
    for case in document["cases"]:
        assert case["ratio"] == pytest.approx(case["peer_ms"] / case["ours_ms"])
        assert sum(case["parts"].values()) == pytest.approx(1.0)
        assert case["ours_peak_mb"] >= 0
    voc, whole = document["cases"]
    assert voc["peer_ms"] == whole["peer_ms"]
    assert voc["ours_ms"] < whole["ours_ms"]
    assert whole["parts"].keys() == {"update", "compute", "recall update", "recall compute"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["evaluate", "--images", "0"], "--images 0"), (["evaluat"], "evaluat"), ([], "KIND")],
)
def test_bad_usage(frcnn, tmp_path, arguments: list[str], named: str) -> None:
    result = frcnn("benchmark", *arguments, cwd=tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert named in result.err


def test_input_is_like_that_of_voc2007_test() -> None:
    predictions, targets = random_split(1000, 100)
    assert sum(len(item["boxes"]) for item in targets) / 1000 == pytest.approx(14976 / 4952, abs=0.2)
    difficult = torch.cat([item["difficult"] for item in targets]).float().mean().item()
    assert difficult == pytest.approx(1 - 12032 / 14976, abs=0.03)
    assert all(len(item["boxes"]) == 100 for item in predictions)
    assert all((item["boxes"][:, 2:] >= item["boxes"][:, :2]).all() for item in predictions)
    assert all((item["scores"].diff() <= 0).all() for item in predictions)
