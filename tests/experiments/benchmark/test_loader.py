"""`frcnn benchmark data`: both loaders read the same images, and the figures are those of one image."""

import json
from pathlib import Path

import pytest
import torch

from experiments.arguments import DataOptions
from experiments.benchmark.loader import CASES, _link_devkit, _our_loader, _peer_loader, _run, _to_batch
from experiments.benchmark.options import LoaderOptions


@pytest.fixture(scope="module")
def devkit(genuine_voc) -> Path:
    return genuine_voc("voc2012-subset.tar")


@pytest.mark.real_data
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_loaders_deliver_the_same(devkit, tmp_path, case):
    """Sizes, numbers of objects and, without crops and colours, pixels; images are flipped at random."""
    assert _link_devkit(devkit, ["2012_train"], tmp_path, 8) == 8
    ours, _ = _our_loader(case, str(tmp_path), 8, 0)
    (images, targets), (peer_images, peer_targets) = (
        next(iter(ours)),
        next(iter(_peer_loader(case, str(tmp_path), 8, 0))),
    )
    assert len(peer_images) == len(images) == 8
    if case.batch:
        batch = _to_batch((images, targets)).tensors
        assert batch.shape == peer_images.shape and batch.dtype == peer_images.dtype
        sums = [sorted(float(image.double().abs().mean()) for image in item) for item in (batch, peer_images)]
        assert sums[0] == pytest.approx(sums[1], rel=0.01)
        return
    assert all(image.dtype == torch.uint8 for image in [*images, *peer_images])
    if case.augmentation == "ssd_crop":
        return
    assert sorted(image.shape for image in images) == sorted(image.shape for image in peer_images)
    assert sorted(len(t["boxes"]) for t in targets) == sorted(len(t["boxes"]) for t in peer_targets)
    if case.augmentation == "flip":
        sums = [sorted(int(image.sum()) for image in item) for item in (images, peer_images)]
        assert sums[0] == sums[1]


@pytest.mark.real_data
def test_json(devkit, frcnn, tmp_path):
    options = ("--data.train_splits", "[2012_train]", "--images", 4, "--batch_size", 2, "--workers", 0, "--repeats", 1)
    result = frcnn("benchmark", "data", "--data.root", devkit, *options, "--format", "json", cwd=tmp_path)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [case["name"] for case in document["cases"]] == [case.name for case in CASES]
    for case in document["cases"]:
        assert case["ratio"] == pytest.approx(case["peer_ms"] / case["ours_ms"])
        assert case["ours_per_s"] == pytest.approx(1000 / case["ours_ms"])
        assert sum(case["parts"].values()) == pytest.approx(1)
    assert document["versions"]["torchvision"] and "cpu" in document["device"]


@pytest.mark.real_data
def test_time_is_that_of_one_image(devkit, tmp_path, monkeypatch):
    """As if an epoch of ours took 600 ms, and one of the peer 900 ms, of two batches of two and an image left over."""
    monkeypatch.setattr("experiments.benchmark.loader.median_times", lambda epochs, device, repeats: [600.0, 900.0])
    assert _link_devkit(devkit, ["2012_train"], tmp_path, 5) == 5
    data = DataOptions(root=str(devkit), train_splits=["2012_train"])
    case = _run(CASES[0], str(tmp_path), LoaderOptions(data=data, batch_size=2, workers=0))
    assert (case.ours_ms, case.peer_ms, case.ours_per_s) == (150, 225, pytest.approx(1000 / 150))


def test_bad_options(frcnn, mini_voc, tmp_path):
    for options, words in (
        (("--data.root", mini_voc, "--data.train_splits", "[train]"), "must hold VOC<year>/"),
        (("--data.root", tmp_path / "none", "--data.train_splits", "[2012_train]"), "no such folder"),
        (("--data.root", mini_voc, "--data.train_splits", "[train]", "--workers", "-1"), "--workers -1"),
        (("--data.train_splits", "[train]"), "--data.root"),
    ):
        result = frcnn("benchmark", "data", *options, cwd=tmp_path)
        assert result.code == 2 and words in result.err
