"""Finished cells whose results are damaged: named, and run again on request."""

import io
import shutil

import pytest
import torch
from rich.console import Console

from experiments.ablation.ablate import _look_for_damage
from experiments.ablation.local_launcher import LocalLauncher
from experiments.ablation.monitor import Monitor


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
    # Which epoch was the best depends on the processor's arithmetic: here it is one before the others.
    earlier = torch.load(folder / "last-previous.ckpt", weights_only=True)
    torch.save(earlier | {"global_step": earlier["global_step"] - 1}, folder / "best.ckpt")
    expected = ("fit", f"--config={cell.path / 'config.yaml'}")
    assert cell.next_stage() == (*expected, f"--ckpt_path={folder / 'last.ckpt'}")
    for name, instead in (("last.ckpt", "last-previous.ckpt"), ("last-previous.ckpt", "best.ckpt")):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        assert cell.next_stage() == (*expected, f"--ckpt_path={folder / instead}")
    (folder / "best.ckpt").write_bytes(b"PK")
    assert cell.next_stage() == tuple(cell.read()["stages"][0])
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["", '{"status": "no', "[]", '{"status": "?", "attempts": null, "seconds": null}'])
def test_a_state_that_is_damaged_before_the_command_is_mended_by_it(cells, damage):
    cell = cells.make("a")
    before = cell.read()
    (cell.path / "cell.json").write_text(damage)
    cell.create(before)
    monitor = Monitor("grid", [cell], 1, io.StringIO())
    assert monitor.cells[0].status == "pending"
    monitor._table()
    cells.launch([cell])
    assert cells.done() == ["fit a", "validate a"]
    assert (cell.read()["status"], cell.read()["attempts"]) == ("done", 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_state_that_is_damaged_while_it_runs_fails_its_cell_alone(cells, tmp_path, terminal):
    first, other = cells.make("a", gate=tmp_path / "gate"), cells.make("b")
    out = io.StringIO()
    with Monitor("grid", [first, other], 1, out) as monitor:
        monitor._console = Console(file=out, force_terminal=terminal)

        def tick() -> None:
            monitor.look()
            monitor._table()
            if cells.waits(first) and not (tmp_path / "gate").exists():
                (first.path / "cell.json").write_text("{")
                (tmp_path / "gate").touch()

        LocalLauncher([{}], program=str(cells.fake)).run([first, other], tick)
    assert cells.done() == ["fit a", "fit b", "validate b"]
    assert first.read()["status"] == "failed"
    assert first.read()["error"] == f"{first.path / 'cell.json'}: is damaged; the same command again mends it"
    assert cells.status(other) == ["done"]
    assert [cell.status for cell in monitor.cells] == ["failed", "done"]
    again = cells.make("a")
    cells.launch([again, other])
    assert cells.status(again) == ["done"]
