"""`frcnn benchmark train|infer --sweep`: how times grow."""

import json

import pytest

from detector.anchors import AnchorConfig
from experiments.benchmark.cases import Case
from experiments.benchmark.sweep import growth, with_scales


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
        Case("a", 100, number=1, detector_ms=20, value=1),
        Case("b", 350, number=4, detector_ms=50, value=4),
    ]
    assert growth("vgg16", cases, "objects") == (
        "vgg16: 4 times the objects (1 to 4): 2.50 times the time of the detector's own parts (20.0 to 50.0 ms)"
    )
    assert "1.14 times the images per second (10 to 11.4)" in growth("vgg16", cases, "batch_size")
