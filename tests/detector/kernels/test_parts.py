"""The parts of a step in a profile: every name, within the right ones, and nothing without a profiler."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.kernels import parts
from detector.kernels.parts import part

OF_A_STEP = {parts.IMAGES, parts.BACKBONE, parts.RPN_HEAD, parts.ANCHORS, parts.PROPOSALS, parts.TARGETS, parts.POOLING}
OF_A_STEP |= {parts.BOX_HEAD, parts.LOSSES, parts.OPTIMIZER}
WITHIN = {parts.MATCHING, parts.SAMPLING}
NAMES = {value for name, value in vars(parts).items() if name.isupper()}


def marks_of(path: Path) -> list[dict[str, Any]]:
    """The marks of a trace, as Perfetto reads them: complete events with a begin and a duration."""
    events = json.loads(path.read_text())["traceEvents"]
    return [one for one in events if one.get("ph") == "X" and one["cat"] == "user_annotation"]


def ends(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def test_nothing_is_marked_without_a_profiler(monkeypatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", refuse)
    with part("a"):
        pass
    with pytest.raises(AssertionError), torch.profiler.profile(), part("a"):
        pass


def test_a_profile_of_a_training_has_the_parts(frcnn, tiny_config, tmp_path) -> None:
    options = ("--config", tiny_config, "--trainer.max_steps", 4, "--trainer.limit_val_batches", 1, "--run_name", "a")
    result = frcnn("fit", *options, "--trainer.profiler", "pytorch", cwd=tmp_path)
    assert result.code == 0, result.err
    (trace,) = (tmp_path / "runs" / "tiny" / "a").glob("fit-*.pt.trace.json")
    marks = marks_of(trace)
    ours = sorted((one for one in marks if one["name"] in NAMES), key=ends)
    assert ours[0]["name"] == parts.OPTIMIZER  # the profiler starts within a step; two whole ones follow
    count = Counter(one["name"] for one in ours[1:])
    assert count.keys() >= OF_A_STEP | WITHIN
    for name in (parts.IMAGES, parts.BACKBONE, parts.RPN_HEAD, parts.ANCHORS, parts.PROPOSALS, parts.POOLING):
        assert count[name] == 2
    assert count[parts.BOX_HEAD] == count[parts.OPTIMIZER] == 2
    assert count[parts.TARGETS] == count[parts.LOSSES] == 4  # of the RPN, and of the RoI heads

    # On a thread marks are one within another or apart, never across each other; which is in which is as it should be.
    for one in ours[1:]:
        (begin, end), around = ends(one), []
        for other in marks:
            first, last = ends(other)
            if other is not one and other["tid"] == one["tid"]:
                assert (
                    end <= first or last <= begin or (first <= begin and end <= last) or (begin <= first <= last <= end)
                )
                if first <= begin and end <= last:
                    around.append(other["name"])
        assert (parts.TARGETS in around) == (one["name"] in WITHIN)
        assert any(name.startswith("Optimizer.step") for name in around)  # Lightning computes the loss within it
    assert [one["name"] for one in ours[1:]][-1] == parts.OPTIMIZER


def test_a_profile_changes_no_loss(frcnn, tiny_config, tmp_path, metrics_of) -> None:
    options = ("fit", "--config", tiny_config, "--trainer.max_steps", 4, "--trainer.limit_val_batches", 1)
    assert frcnn(*options, "--run_name", "plain", cwd=tmp_path).code == 0
    assert frcnn(*options, "--run_name", "seen", "--trainer.profiler", "pytorch", cwd=tmp_path).code == 0
    plain, seen = (metrics_of(tmp_path / "runs" / "tiny" / name) for name in ("plain", "seen"))
    losses = [name for name in plain if "loss" in name]
    assert {f"train/{name}" for name in ("loss", "loss_rpn_cls", "loss_roi_reg")} <= set(losses)
    assert [plain[name] for name in losses] == [seen[name] for name in losses]
