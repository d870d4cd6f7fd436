"""The table of experiments/recipes/README.md agrees with the recipes' files."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
REFERENCE = "py_faster_rcnn_vgg16"


def differences(options: Any, reference: Any) -> str:
    """The options of a recipe that differ from the reference's, by section, as the table shows them."""
    shown = []
    for key in _flat(reference):
        section, _, option = key.rpartition(".")
        value, other = options[key], reference[key]
        if value != other and not _without_effect(option, options):
            shown.append((section.removeprefix("model."), f"{option} {_text(value)}"))
    return "<br>".join(
        f"{section}: {', '.join(text for _, text in group)}" for section, group in groupby(shown, lambda pair: pair[0])
    )


def _flat(options: Any) -> list[str]:
    """The options that the table compares, section by section."""
    sections = ("backbone", "anchors", "rpn", "roi", "image", "optimizer")
    return [
        *("model.difficult", "model.training_scheme"),
        *(f"model.{section}.{key}" for section in sections for key in options.model[section].as_dict()),
        *(f"trainer.{key}" for key in ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")),
        *("data.train_splits", "data.augmentation", "data.batch_size"),
    ]


def _without_effect(option: str, options: Any) -> bool:
    """Whether another option leaves this one without effect."""
    return (
        (option == "max_epochs" and options.trainer.max_epochs == -1)
        or (option == "max_steps" and options.trainer.max_steps == -1)
        or (option in ("milestones", "gamma") and options.model.optimizer.schedule != "step")
        or (option == "warmup_start" and options.model.optimizer.warmup_steps == 0)
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rows() -> dict[str, list[str]]:
    """The cells of each recipe's row in the README."""
    table = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {re.findall(r"\[(\w+)\]", row[0])[0]: row for row in cells}


@pytest.mark.parametrize("name", RECIPES)
def test_readme_shows_the_options_that_differ_from_the_paper(resolve_first_line, name):
    expected = differences(resolve_first_line(RECIPES[name]), resolve_first_line(RECIPES[REFERENCE])) or "the reference"
    link, _, result, shown = rows()[name]
    assert shown == expected
    assert link == f"[{name}]({name}.yaml)"
    header = RECIPES[name].read_text().partition("trainer:")[0]
    for number in re.findall(r"\d\d?\.\d+", result):
        assert number in header


def test_readme_has_no_other_rows():
    assert set(rows()) == set(RECIPES)
