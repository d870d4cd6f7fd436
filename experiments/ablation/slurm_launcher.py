"""Runs the cells of a grid as a SLURM array, through submitit."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detector.errors import InputError, brief
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.checks import check_engine
from experiments.ablation.local_launcher import (
    LAST_MOMENTS,
    LocalLauncher,
    StopRequest,
    Tick,
    note_loss,
    python_path,
    unfinished,
)
from experiments.ablation.processes import COMMAND, PlainStarter

SLURM_DEFAULTS = {"timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1, "cpus_per_task": 4}


def run_on_slurm(
    folders: Sequence[CellFolder],
    slots: Sequence[Mapping[str, str]],
    gpus: int,
    options: Mapping[str, Any],
    tick: Tick,
    stop: StopRequest,
    command: Sequence[str] = COMMAND,
) -> None:
    """Submit all cells as one array, and watch it; a request to stop ends the watching, not the jobs.

    Args:
        folders: Of all cells.
        slots: As many elements of the array run at the same time, if more than one.
        gpus: Of every cell.
        options: Of submitit's executor, over `SLURM_DEFAULTS`, such as slurm_partition or timeout_min; and `cluster`:
            "local" runs all jobs here, at once, to try the grid without SLURM.
        tick: Called again and again.
        stop: Asked whether to stop.
        command: What gets the arguments of the cells' commands.

    Raises:
        InputError: submitit is not installed, there is no SLURM, or it has no such option.
    """
    check_engine("slurm", None)
    import submitit

    waiting = unfinished(folders)
    if not waiting:
        return
    grid = folders[0].path.parent
    settings: dict[str, Any] = SLURM_DEFAULTS | {"gpus_per_node": gpus, "name": grid.name}
    if len(slots) > 1:
        settings["slurm_array_parallelism"] = len(slots)
    settings |= options
    cluster = settings.pop("cluster", "slurm")
    cpus = settings.get("slurm_cpus_per_task", settings["cpus_per_task"])
    environment = {**slots[0], "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(cpus)}
    try:
        executor = submitit.AutoExecutor(folder=grid / "slurm", cluster=cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(**settings)
        paths = [str(folder.path.absolute()) for folder in waiting]
        with _inherited_path():
            submitted = executor.map_array(SlurmCell(command), paths, [environment] * len(paths))
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError, OSError) as error:
        raise InputError(f"--launcher slurm: {brief(error)}") from None
    jobs = dict(zip(submitted, waiting, strict=True))
    with stop.listening():
        while jobs and not stop.count:
            for job in [job for job in jobs if job.done()]:
                folder, problem = jobs.pop(job), job.exception()
                if problem is not None:
                    note_loss(folder, str(problem))
            tick()
            time.sleep(0.5)
    if jobs:
        number = next(iter(jobs)).job_id.split("_")[0]
        end = "kill the processes" if cluster == "local" else f"scancel {number}"
        print(f"frcnn: the array goes on without this command; to end it: {end}", file=sys.stderr)


class SlurmCell:
    """What a job of the array executes; before the job's time is over it saves, and goes back into the queue.

    Args:
        command: What gets the arguments of the cell's commands.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.command = tuple(command)
        self._launcher: LocalLauncher | None = None

    def __call__(self, path: str, environment: Mapping[str, str]) -> str:
        """Run the cell; its status."""
        self._launcher = LocalLauncher([environment], PlainStarter(self.command), patience=LAST_MOMENTS)
        folder = CellFolder(Path(path))
        self._launcher.run([folder])
        return str(folder.read()["status"])

    def checkpoint(self, path: str, environment: Mapping[str, str]) -> Any:
        """Called by submitit, in a signal handler, when the job has to end: what is to be submitted again."""
        from submitit.helpers import DelayedSubmission

        if self._launcher is not None:
            self._launcher.drain()
        return DelayedSubmission(SlurmCell(self.command), path, environment)


@contextlib.contextmanager
def _inherited_path() -> Iterator[None]:
    """Jobs inherit the environment, and have to find this package where it is not installed."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = python_path()
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
