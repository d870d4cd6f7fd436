"""Finished cells whose results are damaged: named, and run again on request."""

import io
import shutil

import pytest

from experiments.ablation.ablate import _look_for_damage


@pytest.mark.parametrize("content", ['{"val/AP50_voc07": NaN}', '{"val/AP50', None])
def test_damaged_results_are_named_and_run_again_on_request(cells, content):
    whole, damaged = cells.make("a"), cells.make("b")
    cells.launch([whole, damaged])
    path = damaged.path / "metrics.json"
    path.unlink() if content is None else path.write_text(content)
    _look_for_damage([whole, damaged], False, said := io.StringIO())
    cells.launch([whole, damaged])
    assert said.getvalue().startswith(f"{path}: ")
    assert said.getvalue().endswith("; --redo_damaged runs the cell again\n")
    assert cells.done() == ["fit a", "validate a", "fit b", "validate b"]
    _look_for_damage([whole, damaged], True, said := io.StringIO())
    assert said.getvalue().endswith("; runs again\n")
    assert cells.status(whole, damaged) == ["done", "interrupted"]
    cells.launch([whole, damaged])
    assert cells.done()[4:] == ["fit b", "validate b"]
    assert damaged.metrics()["val/AP50_voc07"] == 0.5
    _look_for_damage([whole, damaged], False, said := io.StringIO())
    assert said.getvalue() == ""


def test_a_cell_goes_on_from_its_newest_whole_checkpoint(cells, trained):
    cell = cells.make("a")
    for name in ("config.yaml", "checkpoints"):
        (shutil.copytree if name == "checkpoints" else shutil.copy)(trained / name, cell.path / name)
    folder = cell.path / "checkpoints"
    expected = ("fit", f"--config={cell.path / 'config.yaml'}")
    assert cell.next_stage() == (*expected, f"--ckpt_path={folder / 'last.ckpt'}")
    for name, instead in (("last.ckpt", "last-previous.ckpt"), ("last-previous.ckpt", "best.ckpt")):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        assert cell.next_stage() == (*expected, f"--ckpt_path={folder / instead}")
    (folder / "best.ckpt").write_bytes(b"PK")
    assert cell.next_stage() == tuple(cell.read()["stages"][0])
    assert not folder.exists()
