"""The runner of a grid's cells, with commands that do little: kills, crashes, full disks, two runners at once."""

import json
import os
import resource
import signal
import subprocess
from collections import Counter

import pytest

from experiments.ablation import cell_folder, local_launcher
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.local_launcher import LocalLauncher


def test_stages_run_in_order_and_only_once(cells):
    one, two = cells.make("one"), cells.make("two")
    cells.launch([one, two])
    assert cells.done() == ["fit one", "validate one", "fit two", "validate two"]
    state = one.read()
    assert (state["status"], state["attempts"], state["exit_code"], state["error"]) == ("done", 1, 0, None)
    assert state["seconds"] > 0 and state["started"] < state["ended"]
    assert 'axes {"scales": "one", "seed": 7}' in one.log.read_text()
    cells.launch([one, two])
    assert len(cells.done()) == 4


def test_slots_are_given_to_one_cell_at_a_time(cells, tmp_path):
    """Three cells on two slots: the third gets the slot that is free first."""
    gate = tmp_path / "gate"
    one, two, three = cells.make("one", ["validate"], gate=gate), cells.make("two"), cells.make("three")

    def tick() -> None:
        if "validate three" in cells.done():
            gate.touch()

    LocalLauncher([{"SLOT": "a"}, {"SLOT": "b"}], program=str(cells.fake)).run([one, two, three], tick)
    assert cells.status(one, two, three) == ["done"] * 3
    assert ["slot a" in one.log.read_text(), "slot b" in two.log.read_text()] == [True, True]
    assert "slot b" in three.log.read_text()


def test_a_cell_that_fails_does_not_stop_the_others_and_is_tried_again(cells):
    bad, killed, good = cells.make("bad", end="crash"), cells.make("killed", end="kill"), cells.make("good")
    cells.launch([bad, killed, good])
    assert cells.status(bad, killed, good) == ["failed", "failed", "done"]
    assert (bad.read()["exit_code"], killed.read()["exit_code"]) == (3, -signal.SIGKILL)
    assert bad.read()["error"].splitlines()[-3:] == ["one", "two", "three"]
    assert killed.read()["error"].startswith("killed by SIGKILL (out of memory?)")
    cells.launch([bad, killed, good])
    assert cells.done()[-2:] == ["fit bad", "fit killed"]
    assert [folder.read()["attempts"] for folder in (bad, killed, good)] == [2, 2, 1]


@pytest.mark.parametrize("years", [1970, 2099])
def test_a_clock_that_jumps_changes_nothing(cells, monkeypatch, years):
    """A cell that failed at a time that is not yet, or was long ago, is tried again once by the same command."""
    bad, good = cells.make("bad", end="crash"), cells.make("good")
    times = iter(f"{years if number % 2 else 2026}-01-01T00:00:00.{number:03}+00:00" for number in range(1000))
    monkeypatch.setattr(cell_folder, "now", lambda: next(times))
    monkeypatch.setattr("time.time", lambda: {1970: 0.0, 2099: 4e9}[years])
    for attempts in (1, 2, 3):
        cells.launch([bad, good])
        assert cells.status(bad, good) == ["failed", "done"]
        assert [folder.read()["attempts"] for folder in (bad, good)] == [attempts, 1]
    assert all(folder.read()["seconds"] > 0 for folder in (bad, good))


def test_a_full_disk_of_a_cell_lets_no_other_start(cells):
    full, other = cells.make("full", end="disk"), cells.make("other")
    assert "disk is full" in str(cells.launch([full, other]).reason)
    assert cells.status(full, other) == ["failed", "pending"]


def test_kill_of_the_process_group_in_the_middle_of_a_cell(cells, tmp_path, wait_for):
    """The cell's process, in a group of its own, dies with its runner; the next runner does what is missing."""
    gate = tmp_path / "gate"
    folders = [cells.make("a"), cells.make("b", gate=gate), cells.make("c")]
    runner = cells.start_runner(start_new_session=True)
    wait_for(lambda: "fit b" in cells.done())
    wait_for(lambda: cells.waits(folders[1]))
    assert folders[1].lock() is None
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
    wait_for(lambda: cells.free(folders[1]))
    assert cells.status(*folders) == ["done", "running", "pending"]
    assert not (folders[1].path / "metrics.json").exists()
    (folders[1].path / "events.half").touch()
    gate.touch()
    second = cells.start_runner()
    assert second.wait(60) == 0
    assert cells.status(*folders) == ["done"] * 3
    assert cells.done()[2:] == ["fit b", "fit b", "validate b", "fit c", "validate c"]
    assert not (folders[1].path / "events.half").exists()  # without a checkpoint it starts from nothing
    assert [folder.read()["attempts"] for folder in folders] == [1, 2, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_a_cell_once(cells, tmp_path, number, wait_for):
    """As a terminal's Ctrl-C does, the signal goes to the whole group."""
    one, two = cells.make("one", gate=tmp_path / "gate"), cells.make("two")
    runner = cells.start_runner(start_new_session=True)
    wait_for(lambda: cells.waits(one))
    os.killpg(runner.pid, number)
    assert runner.wait(60) == 0
    assert "asked 1 times" in one.log.read_text()
    assert cells.status(one, two) == ["interrupted", "pending"]
    assert one.read()["pid"] is None


def test_a_second_request_kills(cells, tmp_path, wait_for):
    one = cells.make("one", gate=tmp_path / "gate")
    cells.fake.write_text(cells.fake.read_text().replace("asked.append(1)", "None"))  # does not listen
    runner = cells.start_runner()
    wait_for(lambda: cells.waits(one))
    runner.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        runner.wait(1)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(60) == 0
    assert cells.status(one) == ["interrupted"]


def test_two_runners_share_the_cells(cells, tmp_path, wait_for):
    """None is run twice, and both end when all are done: also the one that has nothing to do itself at the end."""
    gate = tmp_path / "gate"
    folders = [cells.make(f"cell{n}", gate=gate) for n in range(4)]
    runners = [cells.start_runner(), cells.start_runner()]
    wait_for(lambda: len(cells.done()) == 2)
    gate.touch()
    assert [runner.wait(60) for runner in runners] == [0, 0]
    assert cells.status(*folders) == ["done"] * 4
    assert sorted(cells.done()) == sorted(f"{stage} cell{n}" for n in range(4) for stage in ("fit", "validate"))


def test_a_cell_whose_runner_is_killed_is_taken_over_by_the_other(cells, tmp_path, wait_for):
    one = cells.make("one", gate=tmp_path / "gate")
    first = cells.start_runner(start_new_session=True)
    wait_for(lambda: cells.done() == ["fit one"])
    second = cells.start_runner()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (tmp_path / "gate").touch()
    assert second.wait(60) == 0
    assert cells.status(one) == ["done"]
    assert cells.done() == ["fit one", "fit one", "validate one"]


def test_full_disk_of_the_runner(cells):
    """RLIMIT_FSIZE stands in for a full disk: one line, and the former state is whole."""
    one = cells.make("one")
    before = (one.path / "cell.json").read_text()
    runner = cells.start_runner(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    assert runner.wait(60) == 1
    assert runner.stderr is not None
    (line,) = runner.stderr.read().splitlines()
    assert "cannot write (File too large)" in line
    assert (one.path / "cell.json").read_text() == before
    assert not list(one.path.glob("*.partial"))
    assert cells.free(one)


def test_a_folder_of_another_cell_is_not_used(cells):
    from detector.errors import InputError

    cells.make("one")
    with pytest.raises(InputError, match="holds another cell"):
        CellFolder(cells.folder / "one").create({"hash": "other", "status": "pending"})


def test_forty_cells_that_do_nothing(cells, monkeypatch):
    """A cell costs one process, and three writes of its state: begun, its command ended, itself ended."""
    folders = [cells.make(f"cell{n:02}", ["validate"]) for n in range(40)]
    cells.fake.write_text("")
    started, written = Counter(), Counter()
    start, write = local_launcher.start, cell_folder.write_json
    monkeypatch.setattr(local_launcher, "start", lambda job, lock: started.update([job.log]) or start(job, lock))
    monkeypatch.setattr(cell_folder, "write_json", lambda path, *rest: written.update([path]) or write(path, *rest))
    cells.launch(folders)
    assert cells.status(*folders) == ["done"] * 40
    assert set(started.values()) == {1} and len(started) == 40
    assert set(written.values()) == {3} and len(written) == 40


def test_state_survives_a_damaged_file(cells):
    one = cells.make("one")
    (one.path / "metrics.json").write_text('{"val/AP50_voc07": 0.')
    assert one.metrics() == {}
    assert json.loads((one.path / "cell.json").read_text())["name"] == "one"
