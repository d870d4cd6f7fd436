"""Which steps and validations of `frcnn benchmark train --callbacks` have callbacks, and what its cases say."""

from dataclasses import replace

import pytest

from experiments.benchmark import callbacks
from experiments.benchmark.callbacks import Timed
from experiments.benchmark.models import standard_network
from experiments.benchmark.options import TrainOptions
from experiments.benchmark.programs import Setting


def test_every_other_step_and_validation_runs_without(monkeypatch) -> None:
    monkeypatch.setattr(callbacks, "IMAGES", 3)
    monkeypatch.setattr(callbacks, "STEPS_OF_A_ROUND", 12)
    network = standard_network("small_c4", (64, 96))
    backbone = replace(network.backbone, weights="none", frozen_stages=0, norm="batch", box_head_channels=16)
    rpn = replace(network.rpn, pre_nms_train=50, post_nms_train=20, pre_nms_test=50, post_nms_test=20)
    roi = replace(network.roi, samples_per_image=16)
    done = callbacks._train(replace(network, backbone=backbone, rpn=rpn, roi=roi), 2, Setting("train", repeats=1))
    steps, validations = ([one for one in done if one.kind == kind] for kind in ("step", "validation"))
    assert [one.on for one in steps] == [True, False] * 3 + [False, True] * 3
    assert [one.on for one in validations] == [False, True] * 3
    assert all("AnchorTelemetry" in one.parts if one.on else not one.parts for one in done)
    times = [one.parts["DetectionImages"] for one in validations if one.on]
    assert min(times[0], times[2]) > 5 * times[1]  # the first and the last are drawn
    assert all(sum(one.parts.values()) < one.milliseconds for one in done)


def test_cases_are_means(monkeypatch) -> None:
    """The first six steps and the first validation without callbacks warm up."""
    steps = [Timed("step", 999.0, True, {"A": 99.0})] * 6
    steps += [Timed("step", 12.0, True, {"A": 3.0, "B": 0.001}), Timed("step", 10.0, False, {})] * 2
    of_validations = [(700.0, False), (300.0, True), (200.0, False), (220.0, True), (210.0, False), (340.0, True)]
    done = steps + [Timed("validation", time, on, {"A": 20.0} if on else {}) for time, on in of_validations]
    monkeypatch.setattr(callbacks, "_train", lambda *_: done)
    benchmark = callbacks.benchmark_callbacks(TrainOptions(networks=["vgg16"], callbacks=True))
    found = [(case.ours_ms, case.peer_ms, case.parts) for case in benchmark.cases]
    expected = [(12, 10, {"A": 0.25}), (220, 205, {"A": 20 / 220}), (320, 205, {"A": 20 / 320})]
    assert found == [(ours, alone, pytest.approx(parts)) for ours, alone, parts in expected]
    assert "20.0 % to a step and 9.8 % to validations, of which one in 20 is drawn" in benchmark.notes[0]  # 225 / 205


def test_one_kind_of_measurement_at_a_time(frcnn, tmp_path) -> None:
    result = frcnn("benchmark", "train", "--callbacks", "--devices", "[1]", cwd=tmp_path)
    assert result.code == 2
    assert result.err.strip().endswith("--sweep, --devices and --callbacks: give one of them")
