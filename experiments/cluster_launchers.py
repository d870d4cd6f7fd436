"""Runs the cells of a grid on other machines, by engines that exist: a Ray cluster, or a SLURM array through submitit.

All machines must see the run folder and the data under the same paths, and have the package installed. Each cell is
one task or job on one machine. One training over several machines is Lightning's own, without a grid:

    torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr HOST --master-port 29500 \\
        -m experiments.cli fit --config X.yaml --trainer.num_nodes 2 --trainer.devices 8     # and rank 1 on the other
    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 \\
        frcnn fit --config X.yaml --trainer.num_nodes 2 --trainer.devices 8                  # in a job of SLURM
"""

import contextlib
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detector.errors import InputError
from experiments.cell_process import COMMAND, SOURCE, PlainStarter
from experiments.cells import CellFolder
from experiments.launchers import LAST_MOMENTS, LocalLauncher, StopRequest, Tick, run_cell

RETRIES = 5
"""Times that a cell is given to another machine after its own was lost."""
SLURM_DEFAULTS = {"timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1, "cpus_per_task": 4}
OBJECT_STORE = 100 * 1024**2
"""Bytes of shared memory for a Ray that is started here: cells pass nothing through it."""


def check_engine(launcher: str, ray_address: str | None) -> None:
    """What can be said before anything starts.

    Raises:
        InputError: The engine is not installed, or nothing answers at Ray's address.
    """
    try:
        if launcher == "ray":
            import ray  # noqa: F401
        elif launcher == "slurm":
            import submitit  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--launcher {launcher}: needs {error.name}, which is not installed; "
            f"pip install 'faster-rcnn-lightning[{launcher}]'"
        ) from None
    if launcher == "ray" and ray_address not in (None, "auto"):
        _check_address(str(ray_address))


def _check_address(address: str) -> None:
    """Ray itself tries for minutes, then ends the process."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--ray-address {address}: must be HOST:PORT as `ray start --head` prints it, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(f"--ray-address {address}: no Ray cluster answers ({error.strerror or error})") from None


# ---- Ray ----


def run_on_ray(
    folders: Sequence[CellFolder],
    environment: Mapping[str, str],
    gpus: int,
    address: str | None,
    tick: Tick,
    stop: StopRequest,
    command: Sequence[str] = COMMAND,
) -> None:
    """Submit each cell as a Ray task that asks for its GPUs, or for CPUs where the cluster has no GPU.

    A cell whose machine is lost is given to another one, `RETRIES` times, and goes on from its last checkpoint.

    Args:
        folders: Of all cells.
        environment: Of every cell.
        gpus: Of every cell, where the cluster has some.
        address: Of a running cluster, "auto" for the one this machine is part of; None starts one here, unless
            RAY_ADDRESS names one.
        tick: Called again and again.
        stop: Asked whether to stop: cells save, and end; the second time they are killed.
        command: What gets the arguments of the cells' commands.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or none of its machines has so many GPUs.
    """
    check_engine("ray", address)
    import ray

    waiting = _open(folders)
    if not waiting:
        return
    _connect(address)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = demand(gpus, int(environment.get("OMP_NUM_THREADS", "1")), machines)
        variables = {**environment, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(cpus)}
        task: Any = ray.remote(run_cell).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)

        def submit(folder: CellFolder) -> Any:
            return task.remote(str(folder.path.absolute()), variables, tuple(command))

        with stop.listening():
            _watch_ray(submit, waiting, tick, stop)
    finally:
        ray.shutdown()


def demand(gpus: int, threads: int, machines: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """CPUs and GPUs that every cell asks Ray for.

    Args:
        gpus: Of a cell, where there are some; its share of their machine's CPUs comes with them.
        threads: Of a cell on CPUs; less where no machine has as many.
        machines: `CPU` and `GPU` of each.

    Raises:
        InputError: No machine has so many GPUs.
    """
    shares = [machine.get("CPU", 0) / machine["GPU"] for machine in machines if machine.get("GPU", 0) >= gpus]
    if shares:
        return max(1, int(min(shares) * gpus)), gpus
    most = max((machine.get("GPU", 0) for machine in machines), default=0)
    if most:
        raise InputError(f"--gpus-per-run {gpus}: no machine of the Ray cluster has more than {most:g} GPUs")
    return max(1, min(threads, int(max((machine.get("CPU", 0) for machine in machines), default=0)))), 0


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here reports to nobody
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if where == "local" else {}
    try:
        ray.init(
            address=where,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
            **own,
        )
    except (Exception, SystemExit) as error:  # Ray exits where it finds that its cluster is gone
        reason = "no Ray cluster answers" if isinstance(error, SystemExit) else str(error).strip().splitlines()[0]
        raise InputError(f"--ray-address {where}: {reason}") from None


def _watch_ray(
    submit: Callable[[CellFolder], Any], folders: Sequence[CellFolder], tick: Tick, stop: StopRequest
) -> None:
    import ray

    waiting, cancelled = {submit(folder): folder for folder in folders}, False
    again: Counter[CellFolder] = Counter()
    while waiting:
        ended, _ = ray.wait(list(waiting), timeout=0.5)
        for reference in ended:
            folder = waiting.pop(reference)
            if _left(reference, folder, stop) and again[folder] < RETRIES:
                again[folder] += 1
                waiting[submit(folder)] = folder
        if stop.count and not cancelled:
            cancelled = True
            for reference in waiting:  # an interrupt, which stops the cell gently
                ray.cancel(reference, force=False)
        if stop.count > 1:
            return
        tick()


def _left(reference: Any, folder: CellFolder, stop: StopRequest) -> bool:
    """Whether the machine, rather than the user, has stopped the cell: `ray stop` there, or an end announced to it."""
    import ray

    try:
        status = ray.get(reference)
    except Exception as error:  # a machine lost too often, or a bug: never the end of the others
        if not stop.count:
            _lost(folder, str(error))
        return False
    return status == "interrupted" and not stop.count


# ---- SLURM ----


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

    waiting = _open(folders)
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
        raise InputError(f"--launcher slurm: {' '.join(str(error).split())}") from None
    jobs = dict(zip(submitted, waiting, strict=True))
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
    os.environ["PYTHONPATH"] = _python_path()
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


# ---- both ----


def _python_path() -> str:
    return os.pathsep.join(dict.fromkeys([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])]))


def _open(folders: Sequence[CellFolder]) -> list[CellFolder]:
    return [folder for folder in folders if folder.read().get("status") != "done"]


def _lost(folder: CellFolder, error: str) -> None:
    """A cell whose machine went away for good is failed, unless it runs elsewhere by now."""
    with folder.locked() as lock:
        if lock is not None and folder.read().get("status") in ("running", "pending"):
            folder.end("failed", 0, None, f"lost: {error.strip().splitlines()[-1]}"[:500])
