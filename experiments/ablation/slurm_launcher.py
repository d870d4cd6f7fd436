"""Runs the cells of a grid as a SLURM array, through submitit; what machines must have is in `ray_launcher`."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detector.errors import InputError, brief
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.launcher import Launcher, import_engine
from experiments.ablation.local_launcher import LAST_MOMENTS, LocalLauncher
from experiments.ablation.processes import PROGRAM, source_variables

SLURM_DEFAULTS = {"timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1, "cpus_per_task": 4}


class SlurmLauncher(Launcher):
    """What submits all cells as one array, and watches it; a request to stop ends the watching, not the jobs.

    Args:
        environments: Of every cell, the same; as many elements of the array run at the same time, if more than one.
        gpus: Of every cell.
        options: Of submitit's executor, over `SLURM_DEFAULTS`, such as slurm_partition or timeout_min; and `cluster`:
            "local" runs all jobs here, at once, to try the grid without SLURM.
        program: What gets the arguments of the cells' commands.

    Raises:
        InputError: submitit is not installed.
    """

    def __init__(
        self, environments: Sequence[Mapping[str, str]], gpus: int, options: Mapping[str, Any], program: str = PROGRAM
    ) -> None:
        super().__init__()
        self.submitit = import_engine("slurm", "submitit")
        self.environments = environments
        self.settings = {**SLURM_DEFAULTS, "gpus_per_node": gpus}
        if len(environments) > 1:
            self.settings["slurm_array_parallelism"] = len(environments)
        self.settings |= options
        self.cluster = self.settings.pop("cluster", "slurm")
        self.program = program

    def run(self, folders: Sequence[CellFolder], tick: Callable[[], None] = lambda: None) -> None:
        """Run what is not done, as `Launcher.run` says.

        Raises:
            InputError: There is no SLURM, or submitit has no such option.
        """
        waiting = [folder for folder in folders if not folder.is_done]
        if not waiting:
            return
        jobs = dict(zip(self._submit(waiting), waiting, strict=True))
        with self.listening():
            while jobs and not self.stops:
                for job in [job for job in jobs if job.done()]:
                    folder, problem = jobs.pop(job), job.exception()
                    if problem is not None:
                        folder.note_loss(str(problem))
                tick()
                time.sleep(0.5)
        if jobs:
            number = next(iter(jobs)).job_id.split("_")[0]
            end = "kill the processes" if self.cluster == "local" else f"scancel {number}"
            print(f"frcnn: the array goes on without this command; to end it: {end}", file=sys.stderr)

    def _submit(self, folders: Sequence[CellFolder]) -> list[Any]:
        grid = folders[0].path.parent
        cpus = self.settings.get("slurm_cpus_per_task", self.settings["cpus_per_task"])
        environment = {**self.environments[0], "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(cpus)}
        os.environ.update(source_variables())  # which jobs inherit
        try:
            executor = self.submitit.AutoExecutor(
                folder=grid / "slurm", cluster=self.cluster, slurm_max_num_timeout=1000
            )
            executor.update_parameters(**{"name": grid.name, **self.settings})
            paths = [str(folder.path.absolute()) for folder in folders]
            submitted: list[Any] = executor.map_array(SlurmJob(environment, self.program), paths)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError, OSError) as error:
            raise InputError(f"--launcher slurm: {brief(error)}") from None
        return submitted


class SlurmJob:
    """What a job of the array executes; before the job's time is over it saves, and goes back into the queue."""

    def __init__(self, environment: Mapping[str, str], program: str = PROGRAM) -> None:
        self.environment = environment
        self.program = program
        self._launcher: LocalLauncher | None = None

    def __call__(self, path: str) -> str:
        """Run the cell in a folder; return its status."""
        self._launcher = LocalLauncher([self.environment], LAST_MOMENTS, self.program)
        folder = CellFolder(Path(path))
        self._launcher.run([folder])
        return str(folder.read()["status"])

    def checkpoint(self, path: str) -> Any:
        """Save, and return what is to be submitted again; called by submitit when the job has to end."""
        from submitit.helpers import DelayedSubmission

        if self._launcher is not None:
            self._launcher.drain()
        return DelayedSubmission(SlurmJob(self.environment, self.program), path)
