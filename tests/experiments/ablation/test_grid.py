"""Grid files: what they say, and every way to write them wrongly."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from detector.errors import InputError
from experiments.ablation.grid import label_of, read_grid

ROOT = Path(__file__).resolve().parents[3]
GRIDS = sorted((ROOT / "experiments" / "ablations").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """`write(key=value, ...)`: a grid file beside a base, the keys replacing those of a good one."""
    (tmp_path / "base.yaml").write_text("")

    def grid(**keys: Any) -> Path:
        content = {"base": "base.yaml", "axes": {"model.anchors.scales": [[8], [4, 16]]}} | keys
        path = tmp_path / "grid.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
        )
        return path

    return grid


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ([4, 8, 16], "4-8-16"),
        ([0.5, 1, 2.0], "0.5-1-2"),
        ([[1, 2], [4]], "1-2_4"),
        (0.00001, "1e-05"),
        (True, "true"),
        (None, "none"),
        ("runs/a b.pth", "runs_a_b.pth"),
        (["a=b", "c,d"], "a_b-c_d"),
    ],
)
def test_labels_are_names_of_files(value, label):
    assert label_of(value) == label


def test_cells_are_the_product_of_axes_and_seeds_without_what_is_excluded(write):
    grid = read_grid(
        write(
            axes={
                "scales": {"option": "model.anchors.scales", "values": [[8], [4, 16]]},
                "recipe": {
                    "values": {
                        "plain": {"model.rpn.reg_weight": 1},
                        "heavy": {"model": {"rpn": {"reg_weight": 10, "reg_normalizer": "locations"}}},
                    }
                },
            },
            seeds=[3, 1],
            exclude=[{"scales": [4, 16], "recipe": "heavy"}],
            baseline="scales=8,recipe=plain",
            overrides={"trainer": {"max_epochs": 2}, "data.batch_size": 1},
            paper={"scales=4-16,recipe=plain": 0.7},
        )
    )
    assert [cell.name for cell in grid.cells()] == [
        "scales=8,recipe=plain,seed=3",
        "scales=8,recipe=heavy,seed=3",
        "scales=4-16,recipe=plain,seed=3",
        "scales=8,recipe=plain,seed=1",
        "scales=8,recipe=heavy,seed=1",
        "scales=4-16,recipe=plain,seed=1",
    ]
    assert grid.cells()[1].options == {
        "trainer.max_epochs": 2,
        "data.batch_size": 1,
        "model.anchors.scales": [8],
        "model.rpn.reg_weight": 10,
        "model.rpn.reg_normalizer": "locations",
    }
    assert grid.baseline == "scales=8,recipe=plain"
    assert grid.paper == {"scales=4-16,recipe=plain": 0.7}


def test_an_override_holds_where_no_value_of_an_axis_sets_another(write):
    values = {"usual": {}, "long": {"trainer.max_epochs": 20}}
    grid = read_grid(write(axes={"length": {"values": values}}, overrides={"trainer.max_epochs": 14}))
    assert [cell.options for cell in grid.cells()] == [{"trainer.max_epochs": 14}, {"trainer.max_epochs": 20}]


def test_short_and_named_forms(write):
    grid = read_grid(
        write(
            axes={
                "model.anchors.scales": {"small": [1, 2], "large": [16]},
                "model.anchors.aspect_ratios": [[1], [0.5, 2]],
            },
            baseline={"scales": [1, 2], "aspect_ratios": "0.5-2"},
        )
    )
    assert [cell.setting for cell in grid.cells()] == [
        "scales=small,aspect_ratios=1",
        "scales=small,aspect_ratios=0.5-2",
        "scales=large,aspect_ratios=1",
        "scales=large,aspect_ratios=0.5-2",
    ]
    assert grid.baseline == "scales=small,aspect_ratios=0.5-2"
    assert grid.seeds == (0,)


def test_excluding_a_value_excludes_it_everywhere(write):
    axes = {"model.anchors.scales": [[8], [16]], "model.rpn.nms_iou": [0.6, 0.7]}
    assert [cell.setting for cell in read_grid(write(axes=axes, exclude=[{"scales": 8}])).cells()] == [
        "scales=16,nms_iou=0.6",
        "scales=16,nms_iou=0.7",
    ]


def test_without_axes_only_seeds_vary(write):
    assert [cell.name for cell in read_grid(write(axes=None, seeds=[0, 1])).cells()] == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"axis": {}}, "'axis' is no key of a grid; there are base,"),
        ({"seed": [1]}, "overrides, paper; did you mean seeds?"),
        ({"base": None}, "base: is missing"),
        ({"base": "nowhere.yaml"}, "base: nowhere.yaml: no such file"),
        ({"base": 3}, "base: 3 is not the path"),
        ({"base": "9" * 5000}, "no such file, neither here nor above"),
        ({"evaluate": ["a.ckpt"]}, "evaluate: ['a.ckpt'] is not the path of a checkpoint"),
        ({"seeds": 3}, "seeds: 3 is not a list"),
        ({"seeds": []}, "seeds: [] must hold at least one"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] must hold"),
        ({"seeds": [1.5]}, "seeds: 1.5 is not a whole number"),
        ({"seeds": [True]}, "seeds: True is not a whole number"),
        ({"axes": [1]}, "axes: [1] is not a mapping"),
        ({"axes": {"scales": [[8]]}}, "axes.scales: [[8]] is not a mapping"),
        ({"axes": {"scales": {"option": "model.anchors.scales"}}}, "axes.scales: values: is missing"),
        ({"axes": {"scales": {"values": [[8]]}}}, "axes.scales.values: without option:"),
        ({"axes": {"scales": {"option": 3, "values": [8]}}}, "axes.scales.option: 3 is not the name"),
        ({"axes": {"scales": {"options": "a.b", "values": [8]}}}, "axes.scales: 'options' is neither"),
        ({"axes": {"model.anchors.scales": 8}}, "axes.model.anchors.scales: 8 is not a list of values"),
        ({"axes": {"model.anchors.scales": []}}, "axes.model.anchors.scales: is empty"),
        ({"axes": {"model.anchors.scales": [[8], [8]]}}, "two values are called 8"),
        ({"axes": {"model.anchors.scales": [list(range(60))]}}, "needs a short name"),
        ({"axes": {"model.anchors.scales": {"a b": [8]}}}, "'a b' becomes part of a folder's name"),
        ({"axes": {"a.scales": [1], "b.scales": [1]}}, "two are called scales"),
        (
            {"axes": {"x": {"option": "a.b", "values": [1]}, "y": {"option": "a.b", "values": [1]}}},
            "a.b is set by both x and y",
        ),
        ({"axes": {"seed": {"option": "a.b", "values": [1]}}}, "axes.seed: seeds have a key of their own"),
        ({"axes": {"x": {"option": "seed_everything", "values": [1]}}}, "seed_everything is set by seeds:"),
        ({"axes": {"x": {"option": "scales", "values": [1]}}}, "'scales' is not the name of an option"),
        (
            {"overrides": {"model.anchors.scales": [8]}},
            "overrides: model.anchors.scales is set by each value of the axis scales",
        ),
        ({"overrides": {"run_name": "x"}}, "overrides: run_name is set by the cell's name"),
        ({"overrides": [1]}, "overrides: [1] is not a mapping"),
        ({"exclude": {"scales": 8}}, "exclude: {'scales': 8} is not a list"),
        ({"exclude": [{"ratios": 1}]}, "exclude: 'ratios' is no axis; there are scales"),
        ({"exclude": [{"scales": 7}]}, "exclude: 7 is no value of scales; there are 8, 4-16"),
        ({"exclude": [{"scales": 8}, {"scales": [4, 16]}]}, "exclude: leaves no cell"),
        ({"exclude": [{"scales": 8}], "baseline": "scales=8"}, "baseline: 'scales=8' is not one cell"),
        ({"baseline": {}}, "baseline: {} is not one cell"),
        ({"baseline": "scales"}, "baseline: 'scales' is not written as axis=value"),
        ({"paper": {"scales=8": 65.8}}, "paper.scales=8: 65.8 is not a fraction"),
        ({"paper": {"scales=3": 0.658}}, "paper: '3' is no value of scales"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(write, keys, message):
    path = write(**keys)
    with pytest.raises(InputError) as error:
        read_grid(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_grids(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_grid(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(InputError, match=r"is no YAML: .*line 2") as error:
        read_grid(tmp_path / "broken.yaml")
    assert "\n" not in str(error.value)
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(InputError, match="not a mapping"):
        read_grid(tmp_path / "list.yaml")


def test_base_is_found_above_the_grid_file(tmp_path, monkeypatch):
    (tmp_path / "experiments" / "ablations").mkdir(parents=True)
    (tmp_path / "experiments" / "x.yaml").write_text("")
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "experiments" / "ablations" / "g.yaml"
    path.write_text("base: experiments/x.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_grid(path).base == tmp_path / "experiments" / "x.yaml"


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grids_of_this_repository(path):
    """The first line is the command; the published numbers are the paper's (Ren et al. 2015, tables 8 and 9)."""
    grid = read_grid(path)
    assert f"frcnn ablate experiments/ablations/{path.name}" in path.read_text().splitlines()[0]
    assert grid.baseline in {cell.setting for cell in grid.cells()}
    published = {
        "anchors_table8": {
            "scales=8,ratios=1": 0.658,
            "scales=16,ratios=1": 0.667,
            "scales=8,ratios=0.5-1-2": 0.688,
            "scales=16,ratios=0.5-1-2": 0.679,
            "scales=8-16-32,ratios=1": 0.698,
            "scales=8-16-32,ratios=0.5-1-2": 0.699,
        },
        "loss_weight_table9": {"lambda=0.1": 0.672, "lambda=1": 0.689, "lambda=10": 0.699, "lambda=100": 0.691},
    }
    assert grid.paper == published.get(path.stem, {})
    assert set(grid.paper) in (set(), {cell.setting for cell in grid.cells()})


def test_there_are_grids():
    names = {"anchors_table8", "loss_weight_table9", "proposals_test_time"}
    names |= {f"{name}_mini_voc" for name in ("anchors", "assignment", "box_losses", "heads")}
    assert names <= {path.stem for path in GRIDS}
