"""Runs the cells of a grid on other machines, by engines that exist: a Ray cluster, or a SLURM array through submitit.

All machines must see the run folder and the data under the same paths, and have the package installed.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detector.errors import InputError
from experiments.cell_process import SOURCE
from experiments.cells import CellFolder
from experiments.launchers import LocalLauncher, StopRequest, Tick, run_cell

RETRIES = 5
"""Times that a cell is given to another machine after its own was lost."""
SLURM_DEFAULTS = {"timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1, "cpus_per_task": 4}


def run_on_ray(
    folders: Sequence[CellFolder],
    environment: Mapping[str, str],
    gpus: int,
    address: str | None,
    tick: Tick,
    stop: StopRequest,
) -> None:
    """Submit each cell as a Ray task that asks for its GPUs, or one CPU where the cluster has no GPU.

    Args:
        folders: Of all cells.
        environment: Of every cell.
        gpus: Of every cell, where the cluster has some.
        address: Of a running cluster, "auto" for the one this machine is part of; None starts one here.
        tick: Called again and again.
        stop: Asked whether to stop.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise _missing("ray") from None
    path = os.pathsep.join(dict.fromkeys([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])]))
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if address is None else None,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray-address {address}: {str(error).splitlines()[0]}") from None
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    task = ray.remote(run_cell).options(
        num_cpus=int(environment.get("OMP_NUM_THREADS", "1")) if not has_gpus else 1,
        num_gpus=gpus if has_gpus else 0,
        max_retries=RETRIES,
    )
    references = {task.remote(str(folder.path.absolute()), dict(environment)): folder for folder in _open(folders)}
    try:
        with stop.listening():
            _watch_ray(references, tick, stop)
    finally:
        if ours:
            ray.shutdown()


def _watch_ray(references: dict[Any, CellFolder], tick: Tick, stop: StopRequest) -> None:
    import ray

    waiting, cancelled = dict(references), False
    while waiting:
        ended, _ = ray.wait(list(waiting), timeout=0.5)
        for reference in ended:
            folder = waiting.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:  # a machine lost too often, or a bug: never the end of the others
                _lost(folder, str(error))
        if stop.count and not cancelled:
            cancelled = True
            for reference in waiting:  # an interrupt, which stops the cell gently
                ray.cancel(reference, force=False)
        if stop.count > 1:
            return
        tick()


def run_on_slurm(
    folders: Sequence[CellFolder],
    slots: Sequence[Mapping[str, str]],
    gpus: int,
    options: Mapping[str, Any],
    tick: Tick,
    stop: StopRequest,
    cluster: str = "slurm",
) -> None:
    """Submit all cells as one array, and watch it; a request to stop ends the watching, not the jobs.

    Args:
        folders: Of all cells.
        slots: As many elements of the array run at the same time, if more than one.
        gpus: Of every cell.
        options: Of submitit's executor, over `SLURM_DEFAULTS`, such as slurm_partition or timeout_min.
        tick: Called again and again.
        stop: Asked whether to stop.
        cluster: "local" runs the jobs on this machine, for tests.

    Raises:
        InputError: submitit is not installed, there is no SLURM, or it has no such option.
    """
    try:
        import submitit
    except ImportError:
        raise _missing("slurm") from None
    if not _open(folders):
        return
    settings: dict[str, Any] = SLURM_DEFAULTS | {"gpus_per_node": gpus}
    if len(slots) > 1:
        settings["slurm_array_parallelism"] = len(slots)
    try:
        executor = submitit.AutoExecutor(
            folder=folders[0].path.parent / "slurm", cluster=cluster, slurm_max_num_timeout=1000
        )
        executor.update_parameters(name=folders[0].path.parent.name, **settings | dict(options))
        waiting = _open(folders)
        paths = [str(folder.path.absolute()) for folder in waiting]
        jobs = dict(zip(executor.map_array(SlurmCell(), paths, [dict(slots[0])] * len(paths)), waiting, strict=True))
    except (RuntimeError, NameError, TypeError, OSError) as error:
        raise InputError(f"--launcher slurm: {' '.join(str(error).split())}") from None
    with stop.listening():
        while jobs and not stop.count:
            for job in [job for job in jobs if job.done()]:
                folder, problem = jobs.pop(job), job.exception()
                if problem is not None:
                    _lost(folder, str(problem))
            tick()
            time.sleep(0.5)
    if jobs:
        number = next(iter(jobs)).job_id.split("_")[0]
        print(f"frcnn: the array goes on without this command; to end it: scancel {number}", file=sys.stderr)


class SlurmCell:
    """What a job of the array executes; before the job's time is over it saves, and goes back into the queue."""

    def __init__(self) -> None:
        self._launcher: LocalLauncher | None = None

    def __call__(self, path: str, environment: Mapping[str, str]) -> str:
        """Run the cell; its status."""
        self._launcher = LocalLauncher([environment])
        folder = CellFolder(Path(path))
        self._launcher.run([folder])
        return str(folder.read()["status"])

    def checkpoint(self, path: str, environment: Mapping[str, str]) -> Any:
        """Called by submitit, in a signal handler, when the job has to end: what is to be submitted again."""
        from submitit.helpers import DelayedSubmission

        if self._launcher is not None:
            self._launcher.drain()
        return DelayedSubmission(SlurmCell(), path, environment)


def _open(folders: Sequence[CellFolder]) -> list[CellFolder]:
    return [folder for folder in folders if folder.read().get("status") != "done"]


def _lost(folder: CellFolder, error: str) -> None:
    """A cell whose machine went away for good is failed, unless it runs elsewhere by now."""
    with folder.locked() as lock:
        if lock is not None and folder.read().get("status") in ("running", "pending"):
            folder.end("failed", 0, None, f"lost: {error.strip().splitlines()[-1]}"[:500])


def _missing(extra: str) -> InputError:
    return InputError(f"--launcher {extra}: is not installed; pip install 'faster-rcnn-lightning[{extra}]'")
