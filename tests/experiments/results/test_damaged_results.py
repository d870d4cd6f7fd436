"""Files of results that are not as they were written: a line or a marked row, never a traceback."""

import json
import shutil
from pathlib import Path

import pytest

from detector.errors import InputError
from detector.files import load_yaml, read_metrics
from experiments.results.runs import read_folder, read_run

NINE = "l0: &l0 [1]\n" + "".join(f"l{n}: &l{n} [{','.join(9 * [f'*l{n - 1}'])}]\n" for n in range(1, 10))
HUGE = "1" + 400 * "0"
ODD = {
    "NaN": "NaN",
    "NaN within": '{"val/AP50_voc07": NaN, "epoch": 1}',
    "number of 400 digits": '{"val/AP50_voc07": ' + HUGE + "}",
    "number beyond all": '{"val/AP50_voc07": 1e999}',
    "list": "[1, 2]",
    "text": '"text"',
    "text within": '{"val/AP50_voc07": "0.5"}',
    "half": '{"val/AP50_voc07": 0.5, "ep',
    "nothing": "",
    "deep": 100_000 * "[",
    "no UTF-8": b"\xff\xfe\x00",
    "history": '{"val/AP50_voc07": 0.5, "test_history": 3, "test_count": 2}',
    "count": '{"val/AP50_voc07": 0.5, "test_count": true}',
}


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))


def test_reports_and_comparisons(frcnn, run):
    for text in ODD.values():
        write(run / "metrics.json", text)
        problem = read_metrics(run / "metrics.json")
        assert isinstance(problem, str)
        (cell,) = read_folder(run.parent).cells
        assert (cell.status, cell.runs[0].error) == ("failed", f"metrics.json {problem}")
        with pytest.raises(InputError, match=r"metrics\.json: .*; the run has no final numbers$"):
            read_run(run)
    result = frcnn("report", run.parent, cwd=run.parents[2])
    assert result.code == 0, result.err
    assert "metrics.json has test_count true" in result.out
    result = frcnn("compare", run, run, cwd=run.parents[2])
    assert (result.code, result.err.count("\n")) == (2, 1)


@pytest.mark.parametrize("kind", ["number of 400 digits", "history"])
def test_a_test_sets_aside_what_is_damaged(frcnn, run, kind):
    """Also the curves; its own numbers are written as if there had been none."""
    for name in ("metrics.json", "curves.json"):
        write(run / name, ODD[kind] if name == "metrics.json" or kind != "history" else "3")
    options = ("--ckpt_path", run / "checkpoints" / "last.ckpt", "--data.test_splits", "[test]")
    result = frcnn("test", *options, cwd=run.parents[2])
    assert result.code == 0, result.err
    for name in ("metrics.json", "curves.json"):
        assert f"{name}: " in result.err
        assert f"it is {name}.damaged now" in result.err
    metrics = read_metrics(run / "metrics.json")
    assert isinstance(metrics, dict)
    assert (metrics["test_count"], metrics["test_history"]) == (1, [])
    assert set(json.loads((run / "curves.json").read_text())) == {"test"}


def test_odd_details_are_left_out(frcnn, run):
    metrics = json.loads((run / "metrics.json").read_text())
    for extra in ({"k": 3}, {"val": 3, "test": [1]}, {"val": {"k": "x"}}):
        (run / "metrics.json").write_text(json.dumps(metrics | {"proposal_recall_by_size": extra, "val/recall@x": 0.5}))
        result = frcnn("report", run.parent, "--format", "json", "--bootstrap", 2, cwd=run.parents[2])
        assert result.code == 0, result.err


@pytest.mark.parametrize("config", ["model: 3", "data: 3", "[1, 2]", NINE, 5000 * "["])
def test_odd_configs(frcnn, run, config):
    (run / "config.yaml").write_text(config)
    assert read_folder(run.parent).cells[0].status == "done"
    for command in (
        ("compare", run, run),
        ("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt"),
        ("fit", "--data.root", run, "--model.rpn", run / "config.yaml"),
        ("ablate", run / "config.yaml"),
    ):
        result = frcnn(*command, cwd=run.parents[2])
        assert (result.code, result.err.count("\n")) == (2, 1)


def test_report_of_a_config_without_options(frcnn, run):
    (run / "config.yaml").write_text("model: 3\ndata: 4")
    result = frcnn("report", run.parent, "--bootstrap", 2, cwd=run.parents[2])
    assert result.code == 0
    assert "config.yaml: data: 4; options are needed" in result.out


def test_states_of_cells(tmp_path, writer):
    """A state that is damaged, or of other kinds, makes a failed cell; a seed of another kind a line."""
    cells = [writer.cell("a", 0), writer.cell("b", 0)]
    writer.plan(tmp_path, cells)
    for cell in cells:
        writer.run(tmp_path, cell, "done", 0.5)
    for text in ODD.values():
        write(tmp_path / cells[0]["folder"] / "cell.json", text)
        assert [cell.status for cell in read_folder(tmp_path).cells][1] == "done"
    write(tmp_path / cells[0]["folder"] / "cell.json", '{"status": "done", "seconds": "long", "seed": [1]}')
    assert [cell.status for cell in read_folder(tmp_path).cells] == ["failed", "done"]
    for text in ODD.values():
        write(tmp_path / "grid.json", text)
        with pytest.raises(InputError, match=r"grid\.json"):
            read_folder(tmp_path)
    writer.plan(tmp_path, [cells[0] | {"seed": [1]}, cells[1]])
    with pytest.raises(InputError, match=r"cell 0 has the seed \[1\]"):
        read_folder(tmp_path)


def test_yaml_of_reasonable_size_only():
    assert load_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    with pytest.raises(InputError, match=r"^x: is no YAML: nested deeper than 100$"):
        load_yaml(101 * "[" + 101 * "]", "x")
    with pytest.raises(InputError, match=r"^x: is no YAML: too large with all its aliases$"):
        load_yaml(NINE, "x")
    with pytest.raises(InputError, match="is no YAML"):
        load_yaml("a: !!python/object/apply:os.system [ls]", "x")
    with pytest.raises(InputError, match="is no YAML"):
        load_yaml("a: &a [*a]", "x")
    # of a version that libyaml refuses, and Python's own parser takes
    with pytest.raises(InputError, match=r"^x: is no YAML: nested deeper than 100$"):
        load_yaml("%YAML 1.3\n--- " + 5000 * "[", "x")
    with pytest.raises(InputError, match=r"^x: is no YAML: too large with all its aliases$"):
        load_yaml(f"%YAML 1.3\n---\n{NINE}", "x")
