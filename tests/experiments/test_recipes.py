"""Recipes of published systems: each states the options that define its system."""

from pathlib import Path
from typing import Any

import pytest

from tests.experiments.published_recipes import PUBLISHED

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_what_the_system_published(resolve_first_line, name):
    options = resolve_first_line(RECIPES[name])
    stated = {key: options[key] for key in PUBLISHED[name]}
    assert stated == {key: _about(value) for key, value in PUBLISHED[name].items()}


def _about(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("name", "milestones"),
    [
        ("py_faster_rcnn_vgg16", [50 / 70]),
        ("chenyuntc_vgg16", [10 / 14]),
        ("detectron2_resnet50_c4", [12 / 18, 16 / 18]),
        ("detectron2_resnet50_fpn", [12 / 18, 16 / 18]),
        ("cascade_rcnn_resnet50_fpn", [8 / 12, 11 / 12]),
        ("dynamic_rcnn_resnet50_fpn", [8 / 12, 11 / 12]),
        ("mmdetection_resnet50_fpn", [8 / 12, 11 / 12]),
        ("faster_rcnn_convnext_tiny_fpn", [27 / 36, 33 / 36]),
    ],
)
def test_learning_rate_drops_where_published(resolve_first_line, name, milestones):
    assert resolve_first_line(RECIPES[name]).model.optimizer.milestones == pytest.approx(milestones, abs=1e-4)


def test_learning_rates_of_stages_are_near_those_of_mmdetections_layers(resolve_first_line):
    """Of its layers 0 to 6 in 8 - 1 - n powers of 0.95: stem, stages 1 and 2, three parts of stage 3, and stage 4."""
    theirs = [0.95**6, 0.95**5, (0.95**4 + 0.95**3 + 0.95**2) / 3, 0.95]
    decay = resolve_first_line(RECIPES["faster_rcnn_convnext_tiny_fpn"]).model.optimizer.layer_decay
    assert [decay**power for power in (4, 3, 2, 1)] == pytest.approx(theirs, abs=0.04)


def test_every_system_has_a_recipe():
    assert set(RECIPES) <= set(PUBLISHED)
    assert {name for name in PUBLISHED if not name.startswith("torchvision_")} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_system_and_reported_result(name):
    lines = RECIPES[name].read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert header[1].startswith("# System: ")
    assert sum(line.startswith("# Reported: ") for line in header) == 1
