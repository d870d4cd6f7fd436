"""Cells on a Ray cluster of two nodes, one of which is killed, and in an array of submitit; all on this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from detector.errors import InputError
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.ray_launcher import demand
from experiments.ablation.slurm_launcher import SlurmLauncher

ROOT = Path(__file__).resolve().parents[3]

DRIVER = """
import sys
from pathlib import Path
from detector.errors import InputError
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.ray_launcher import RayLauncher

folders = [CellFolder(path) for path in sorted(Path(sys.argv[1]).iterdir())]
try:
    RayLauncher({"OMP_NUM_THREADS": "1"}, 1, sys.argv[3], program=sys.argv[2]).run(folders)
except InputError as error:
    sys.exit(str(error))
"""


# ---- Ray ----


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with one CPU, which notices lost nodes soon. Its processes die with this one."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets need a short path
    health = {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # no network
        patch.setenv("RAY_TMPDIR", folder)  # nor does a cluster of the user's become another one
        started = cluster_utils.Cluster()
        try:
            started.add_node(
                num_cpus=1,
                object_store_memory=80 * 1024**2,
                include_dashboard=False,
                _system_config={f"health_check_{key}": value for key, value in health.items()},
            )
            yield started
        finally:
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def drive(cells, cluster, process_group, tmp_path) -> Callable[[], "subprocess.Popen[str]"]:
    """`drive()`: runs all cells on the cluster, from a process group of its own, which does not outlive the test."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    return lambda: process_group([script, cells.folder, cells.fake, cluster.address], stderr=subprocess.STDOUT)


def is_on(folder: CellFolder, node: Any) -> bool:
    """Whether a Ray worker of this node runs the cell: workers are children of their node's raylet."""
    (raylet,) = node.all_processes["raylet"]
    fields = Path(f"/proc/{folder.read()['pid']}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]) == raylet.process.pid


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(600)
def test_all_cells_finish_when_a_node_is_killed(cells, cluster, drive, tmp_path, wait_for):
    gate = tmp_path / "gate"
    folders = [cells.make(name, gate=gate) for name in ("a", "b")] + [cells.make("c"), cells.make("d")]
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 1024**2)
    driver = drive()
    wait_for(lambda: cells.waits(folders[0]) and cells.waits(folders[1]))
    (lost,) = (folder for folder in folders[:2] if is_on(folder, node))
    (kept,) = (folder for folder in folders[:2] if folder != lost)
    cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: cells.free(lost))  # its process is gone, too
    assert cells.status(lost, kept) == ["running", "running"]
    gate.touch()
    out, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, out
    assert cells.status(*folders) == ["done"] * 4
    assert cells.attempts(lost, kept, *folders[2:]) == [2, 1, 1, 1]
    names = [folder.path.name for folder in folders]
    ran = [f"{stage} {name}" for name in names for stage in ("fit", "validate")]
    assert sorted(cells.done()) == sorted([*ran, f"fit {lost.path.name}"])  # its first was cut off, none was repeated


@pytest.mark.timeout(600)
def test_failed_cells_are_named_and_tried_again_by_the_same_command(cells, drive):
    bad, good = cells.make("bad", end="crash"), cells.make("good")
    assert drive().wait(200) == 0
    assert cells.status(bad, good) == ["failed", "done"]
    assert bad.read()["exit_code"] == 3
    assert bad.read()["error"].splitlines()[-3:] == ["one", "two", "three"]
    assert 'axes {"scales": "good", "seed": 7}' in good.log.read_text()
    assert drive().wait(200) == 0
    assert cells.attempts(bad, good) == [2, 1]
    assert cells.done() == ["fit bad", "fit good", "validate good", "fit bad"]


@pytest.mark.timeout(600)
def test_a_request_to_stop_lets_cells_save_and_leaves_the_others(cells, drive, tmp_path, wait_for):
    one, two = cells.make("one", gate=tmp_path / "gate"), cells.make("two")
    driver = drive()
    wait_for(lambda: cells.waits(one))
    os.killpg(driver.pid, signal.SIGINT)
    out, _ = driver.communicate(timeout=100)
    assert driver.returncode == 0, out
    assert "asked 1 times" in one.log.read_text()
    assert cells.status(one, two) == ["interrupted", "pending"]


@pytest.mark.timeout(600)
def test_a_cell_that_its_machine_stops_is_given_to_another(cells, drive, tmp_path, wait_for):
    """SIGTERM to the worker, as `ray stop` and machines that are taken away send it: saved, and goes on elsewhere."""
    gate = tmp_path / "gate"
    one = cells.make("one", gate=gate)
    driver = drive()
    wait_for(lambda: cells.waits(one))
    os.kill(one.read()["pid"], signal.SIGTERM)
    wait_for(lambda: cells.attempts(one) == [2])
    gate.touch()
    out, _ = driver.communicate(timeout=100)
    assert driver.returncode == 0, out
    assert (cells.status(one), cells.attempts(one)) == (["done"], [2])
    assert "asked 1 times" in one.log.read_text()


def test_demand():
    """CPUs and GPUs of a cell that wants so many GPUs, or else so many threads."""
    small, large = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 40.0, "GPU": 4.0}
    head = {"CPU": 3.0, "memory": 1e9}
    assert demand(1, 16, [head, small, large]) == (4, 1)
    assert demand(3, 16, [head, small, large]) == (30, 3)
    assert demand(1, 16, [{"CPU": 1.0, "GPU": 4.0}]) == (1, 1)
    assert demand(1, 2, [head]) == (2, 0)
    assert demand(1, 16, [{"CPU": 2.0}, head]) == (3, 0)  # or no machine would ever take it
    with pytest.raises(InputError, match="--gpus_per_run 5: no machine of the Ray cluster has more than 4 GPUs"):
        demand(5, 16, [head, small, large])


# ---- submitit ----


class Array:
    """Submits cells to submitit's local executor: an array whose jobs all run at once, on this machine."""

    def __init__(self, cells: Any) -> None:
        self.cells = cells
        self.launcher: SlurmLauncher | None = None

    def run(self, *folders: CellFolder, tick: Callable[[], None] = lambda: None, **options: Any) -> None:
        settings = {"cluster": "local", **options}
        self.launcher = SlurmLauncher([{"SLOT": "x"}], 0, settings, program=str(self.cells.fake))
        self.launcher.run(folders, tick)

    def job_files(self) -> set[str]:
        return {path.name for path in (self.cells.folder / "slurm").iterdir()}


@pytest.fixture
def array(cells, tmp_path) -> Iterator[Array]:
    pytest.importorskip("submitit")
    yield Array(cells)
    (tmp_path / "gate").touch()  # whatever waits ends


def test_an_array_finishes_and_only_what_failed_is_submitted_again(cells, array, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bad, good = cells.make("bad", end="crash"), cells.make("good")
    array.run(bad, good, slurm_cpus_per_task=6)
    assert cells.status(bad, good) == ["failed", "done"]
    assert bad.read()["exit_code"] == 3
    assert bad.read()["error"].splitlines()[-3:] == ["one", "two", "three"]
    assert 'axes {"scales": "good", "seed": 7} slot x threads 6' in good.log.read_text()
    assert good.metrics()["stage"] == "validate"
    before = array.job_files()
    array.run(bad, good)
    assert (cells.attempts(bad, good), len(array.job_files() - before)) == ([2, 1], len(before) // 2)
    bad.update(status="done")
    before = array.job_files()
    array.run(bad, good)
    assert array.job_files() == before
    assert len(cells.done()) == 4


def test_a_job_whose_time_is_over_saves_and_is_queued_again(cells, array, tmp_path):
    """SLURM announces the end by SIGUSR2; submitit's executor starts the job again."""
    one, told = cells.make("one", gate=tmp_path / "gate"), []

    def tick() -> None:
        if cells.waits(one) and not told:
            told.append(os.kill(one.read()["pid"], signal.SIGUSR2))
        if cells.attempts(one) == [2]:
            (tmp_path / "gate").touch()

    array.run(one, tick=tick)
    assert (cells.status(one), cells.attempts(one)) == (["done"], [2])
    assert "asked 1 times" in one.log.read_text()
    assert cells.done() == ["fit one", "fit one", "validate one"]


def test_a_job_that_is_killed_is_named(cells, array, tmp_path):
    """With its machine, say: nothing of it is left to write into the cell's folder."""
    one, two, told = cells.make("one", gate=tmp_path / "gate"), cells.make("two"), []

    def tick() -> None:
        if cells.waits(one) and not told:
            told.append(os.kill(one.read()["pid"], signal.SIGKILL))

    array.run(one, two, tick=tick)
    assert cells.status(one, two) == ["failed", "done"]
    assert one.read()["error"].startswith("lost: ")


def test_the_array_outlives_a_request_to_stop(cells, array, tmp_path, capfd, wait_for):
    one = cells.make("one", gate=tmp_path / "gate")
    array.run(one, tick=lambda: array.launcher.stop() if cells.waits(one) else None)
    assert "the array goes on without this command" in capfd.readouterr().err
    assert cells.status(one) == ["running"]
    (tmp_path / "gate").touch()
    wait_for(lambda: cells.status(one) == ["done"])
    assert cells.attempts(one) == [1]


def test_bad_options_of_submitit(cells, array, monkeypatch):
    one = cells.make("one")
    for options, message in (
        ({"timeout": 3}, "timeout"),
        ({"timeout_min": "soon"}, "timeout_min"),
        ({"cluster": "sun"}, "sun"),
    ):
        with pytest.raises(InputError, match=f"--launcher slurm: .*{message}"):
            array.run(one, **options)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"--launcher slurm: .*srun"):
        array.run(one, cluster="slurm")
    assert cells.status(one) == ["pending"]


# ---- the command line ----


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def grid(tiny_config, tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(f"base: {tiny_config}\naxes: {{model.anchors.scales: [[1], [1, 2]]}}\nseeds: [5]\n")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--launcher", "ray", "--ray_address", "{port}"], "--ray_address 127.0.0.1:{n}: no Ray cluster answers (Conn"),
        (["--launcher", "ray", "--ray_address", "head"], "--ray_address head: must be HOST:PORT"),
        (["--launcher", "ray", "--ray_address", "ray://head:10001"], "ray://head:10001: must be HOST:PORT"),
        (["--launcher", "ray", "--ray_address", "head:123456"], "--ray_address head:123456: must be HOST:PORT"),
        (["--ray_address", "auto"], "--ray_address: without effect; add --launcher ray"),
        (["--slurm", "{{timeout_min: 3}}"], "--slurm: without effect; add --launcher slurm"),
    ],
)
def test_bad_options(frcnn, grid, tmp_path, options, message):
    port = closed_port()
    options = [option.format(port=f"127.0.0.1:{port}") for option in options]
    result = frcnn("ablate", grid, *options, cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message.format(n=port) in result.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("launcher", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_named(frcnn, grid, tmp_path, monkeypatch, launcher, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = frcnn("ablate", grid, "--launcher", launcher, cwd=tmp_path)
    assert result.code == 2
    assert result.err == (
        f"frcnn: --launcher {launcher}: needs {package}, which is not installed; "
        f"pip install 'faster-rcnn-lightning[{launcher}]'\n"
    )
    assert frcnn("ablate", grid, "--launcher", launcher, "--dry-run", cwd=tmp_path).code == 0
