"""A grid file that is edited between two runs: what was done is found again, and said in one line."""

import io
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import yaml

from experiments.ablation.ablate import _prepare
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.grid import read_grid
from experiments.ablation.plan import Plan, plan

GRID = {
    "axes": {"scales": {"option": "model.anchors.scales", "values": {"one": [1], "two": [1, 2]}}},
    "seeds": [3, 4],
}
NAMES = ["scales=one,seed=3", "scales=two,seed=3", "scales=one,seed=4", "scales=two,seed=4"]

Edit = Callable[..., tuple[Plan, list[str]]]


@pytest.fixture
def prepare(tiny_config, tmp_path, monkeypatch) -> Edit:
    """`prepare(**keys)`: the plan of `GRID` with other keys, after its folders were made, and the lines on that."""
    monkeypatch.chdir(tmp_path)

    def run(**keys: object) -> tuple[Plan, list[str]]:
        (tmp_path / "base.yaml").write_text(keys.pop("text", tiny_config.read_text()))
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"base": "base.yaml"} | GRID | keys, sort_keys=False))
        planned = plan(read_grid("grid.yaml"), "runs")
        folders = _prepare(planned, SimpleNamespace(steps=[9] * len(planned.cells)), said := io.StringIO())
        for folder in folders:
            if folder.read()["status"] == "pending":
                folder.update(status="done", attempts=1)
        return planned, said.getvalue().splitlines()

    return run


def folders_of(planned: Plan) -> dict[str, object]:
    return {cell.name: cell.folder for cell in planned.cells}


def with_nms_iou(tiny_config, value: float) -> str:
    base = yaml.safe_load(tiny_config.read_text())
    base["model"]["rpn"]["nms_iou"] = value
    return yaml.safe_dump(base)


def test_the_same_again_says_nothing(prepare):
    first, lines = prepare()
    assert lines == []
    assert [cell.name for cell in first.cells] == NAMES
    again, lines = prepare()
    assert lines == []
    assert folders_of(again) == folders_of(first)


def test_values_and_seeds_that_are_added_leave_the_others_done(prepare):
    first, _ = prepare()
    axes = {"scales": {"option": "model.anchors.scales", "values": {"one": [1], "two": [1, 2], "three": [3]}}}
    more, lines = prepare(axes=axes, seeds=[3, 4, 5])
    assert lines == []
    assert len(more.cells) == 9
    assert folders_of(first).items() < folders_of(more).items()


def test_values_that_are_removed_are_named_and_found_again(prepare):
    first, _ = prepare()
    axes = {"scales": {"option": "model.anchors.scales", "values": {"one": [1]}}}
    fewer, lines = prepare(axes=axes)
    assert lines == [
        "2 earlier cells not in the grid any more: scales=two,seed=3, scales=two,seed=4; the folders stay, and reports "
        "leave them out"
    ]
    assert len(fewer.cells) == 2
    assert all((cell.folder / "cell.json").is_file() for cell in first.cells)
    again, lines = prepare()
    assert lines == []
    assert folders_of(again) == folders_of(first)


def test_a_renamed_axis_keeps_what_was_done(prepare):
    first, _ = prepare()
    axes = {"sizes": {"option": "model.anchors.scales", "values": {"a": [1], "b": [1, 2]}}}
    renamed, lines = prepare(axes=axes)
    assert lines == [
        "other names, the same options, so their folders stay: scales=one,seed=3 -> sizes=a,seed=3, "
        "scales=two,seed=3 -> sizes=b,seed=3, scales=one,seed=4 -> sizes=a,seed=4, scales=two,seed=4 -> sizes=b,seed=4"
    ]
    assert list(folders_of(renamed).values()) == list(folders_of(first).values())
    assert [cell.folder.name for cell in renamed.cells] == [plan["folder"] for plan in renamed.document()["cells"]]
    _, lines = prepare(axes=axes)
    assert lines == []


def test_an_edited_base_begins_anew_and_the_former_one_is_found_again(prepare, tiny_config):
    first, _ = prepare()
    other, (line,) = prepare(text=with_nms_iou(tiny_config, 0.6))
    assert line == (
        "base.yaml, or the grid's options, have changed since the last run: model.rpn.nms_iou: 0.7 -> 0.6. The cells "
        "that this concerns start anew; what was done before stays in its folders."
    )
    assert not set(folders_of(other).values()) & set(folders_of(first).values())
    again, _ = prepare()
    assert folders_of(again) == folders_of(first)


def as_an_earlier_version_left_it(planned: Plan, option: str) -> list[object]:
    """Take an option out of what was planned, and give cells other hashes; return their folders, which are named so."""
    document = json.loads((planned.folder / "grid.json").read_text())
    del document["base_options"][option]
    folders = []
    for number, (cell, done) in enumerate(zip(document["cells"], planned.cells, strict=True)):
        cell["hash"] = f"{number}" * 64
        CellFolder(done.folder).update(hash=cell["hash"])
        folders.append(done.folder.rename(done.folder.with_name(f"{cell['name']}-{cell['hash'][:8]}")))
    (planned.folder / "grid.json").write_text(json.dumps(document))
    return folders


def test_an_option_that_a_later_version_adds_leaves_cells_done_at_its_default(prepare, tiny_config):
    folders = as_an_earlier_version_left_it(prepare()[0], "model.rpn.nms_iou")
    for _ in range(2):
        again, lines = prepare()
        assert lines == []
        assert list(folders_of(again).values()) == folders
        assert all(CellFolder(folder).is_done for folder in folders)
    other, (line,) = prepare(text=with_nms_iou(tiny_config, 0.6))
    assert "changed since the last run: model.rpn.nms_iou: 0.7 -> 0.6. The cells" in line
    assert not set(folders_of(other).values()) & set(folders)


def test_an_option_that_a_later_version_adds_begins_cells_anew_at_another_value(prepare, tiny_config):
    text = with_nms_iou(tiny_config, 0.6)
    folders = as_an_earlier_version_left_it(prepare(text=text)[0], "model.rpn.nms_iou")
    other, (line,) = prepare(text=text)
    assert "model.rpn.nms_iou: not there -> 0.6" in line
    assert not set(folders_of(other).values()) & set(folders)


def test_a_damaged_plan_is_named_and_costs_nothing(prepare):
    first, _ = prepare()
    (first.folder / "grid.json").write_text('{"cells": [')
    again, lines = prepare()
    assert lines == [f"{first.folder / 'grid.json'}: is no whole JSON document; was it cut short?; it is written anew"]
    assert folders_of(again) == folders_of(first)
