"""Runs the cells of a grid on other machines, by engines that exist: a Ray cluster, or a SLURM array through submitit.

All machines must see the run folder and the data under the same paths, and have the package installed. Each cell is
one task or job on one machine. One training over several machines is Lightning's own, without a grid:

    torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr HOST --master-port 29500 \\
        -m experiments.cli fit --config X.yaml --trainer.num_nodes 2 --trainer.devices 8     # and rank 1 on the other
    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 \\
        frcnn fit --config X.yaml --trainer.num_nodes 2 --trainer.devices 8                  # in a job of SLURM
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detector.errors import InputError
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.checks import check_engine
from experiments.ablation.local_launcher import StopRequest, Tick, note_loss, python_path, run_cell, unfinished
from experiments.ablation.processes import COMMAND

RETRIES = 5
"""Times that a cell is given to another machine after its own was lost."""
OBJECT_STORE = 100 * 1024**2
"""Bytes of shared memory for a Ray that is started here: cells pass nothing through it."""


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

    waiting = unfinished(folders)
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
        raise InputError(f"--gpus_per_run {gpus}: no machine of the Ray cluster has more than {most:g} GPUs")
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
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            **own,
        )
    except (Exception, SystemExit) as error:  # Ray exits where it finds that its cluster is gone
        reason = "no Ray cluster answers" if isinstance(error, SystemExit) else str(error).strip().splitlines()[0]
        raise InputError(f"--ray_address {where}: {reason}") from None


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
            note_loss(folder, str(error))
        return False
    return status == "interrupted" and not stop.count


# ---- SLURM ----


# ---- both ----
