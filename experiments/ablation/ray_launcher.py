"""The launcher that runs cells on the machines of a Ray cluster.

All machines must see the run folder and the data under the same paths, and have the package installed. Each cell is
one task on one machine. One training over several machines is a matter of torchrun or srun, without a grid.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detector.errors import InputError
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.launcher import Launcher, import_engine
from experiments.ablation.local_launcher import run_cell
from experiments.ablation.processes import PROGRAM, source_variables

RETRIES = 5
"""Times that a cell is given to another machine after its own was lost."""
OBJECT_STORE = 100 * 1024**2
"""Bytes of shared memory for a Ray that is started here: cells pass nothing through it."""


class RayLauncher(Launcher):
    """What submits each cell as a Ray task that asks for its GPUs, or for CPUs where the cluster has no GPU.

    A cell whose machine is lost is given to another one, `RETRIES` times, and goes on from its last checkpoint. The
    address "auto" is that of the cluster that this machine is part of; None starts one here, unless RAY_ADDRESS names
    one.

    Raises:
        InputError: Ray is not installed, or nothing answers at the address.
    """

    def __init__(self, environment: Mapping[str, str], gpus: int, address: str | None, program: str = PROGRAM) -> None:
        super().__init__()
        self.ray = import_engine("ray", "ray")
        self.environment = environment
        self.gpus = gpus
        self.address = address
        self.program = program
        if address not in (None, "auto"):
            _check_address(str(address))

    def run(self, folders: Sequence[CellFolder], tick: Callable[[], None] = lambda: None) -> None:
        """Run what is not done, as `Launcher.run` says.

        Raises:
            InputError: There is no such cluster, or none of its machines has so many GPUs.
        """
        waiting = [folder for folder in folders if not folder.is_done]
        if not waiting:
            return
        self._connect()
        try:
            machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            cpus, gpus = demand(self.gpus, int(self.environment.get("OMP_NUM_THREADS", "1")), machines)
            variables = {**self.environment, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(cpus)}
            task = self.ray.remote(run_cell).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)

            def submit(folder: CellFolder) -> Any:
                return task.remote(str(folder.path.absolute()), variables, self.program)

            with self.listening():
                self._watch(submit, waiting, tick)
        finally:
            self.ray.shutdown()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here reports to nobody
        where = self.address or os.environ.get("RAY_ADDRESS") or "local"
        own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if where == "local" else {}
        try:
            self.ray.init(
                address=where,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": source_variables()},
                **own,
            )
        except (Exception, SystemExit) as error:  # Ray exits where it finds that its cluster is gone
            reason = "no Ray cluster answers" if isinstance(error, SystemExit) else str(error).strip().splitlines()[0]
            raise InputError(f"--ray_address {where}: {reason}") from None

    def _watch(
        self, submit: Callable[[CellFolder], Any], folders: Sequence[CellFolder], tick: Callable[[], None]
    ) -> None:
        waiting, cancelled = {submit(folder): folder for folder in folders}, False
        again: Counter[CellFolder] = Counter()
        while waiting and self.stops < 2:
            ended, _ = self.ray.wait(list(waiting), timeout=0.5)
            for reference in ended:
                folder = waiting.pop(reference)
                if self._was_stopped(reference, folder) and again[folder] < RETRIES:
                    again[folder] += 1
                    waiting[submit(folder)] = folder
            if self.stops and not cancelled:
                cancelled = True
                for reference in waiting:  # an interrupt, which stops the cell gently
                    self.ray.cancel(reference, force=False)
            tick()

    def _was_stopped(self, reference: Any, folder: CellFolder) -> bool:
        """Return whether its machine, not the user, has stopped the cell: by `ray stop`, or as an end was announced."""
        try:
            status = self.ray.get(reference)
        except Exception as error:  # a machine lost too often, or a bug: never the end of the others
            if not self.stops:
                folder.note_loss(str(error))
            return False
        return status == "interrupted" and not self.stops


def _check_address(address: str) -> None:
    """Refuse an address at which no cluster answers; Ray itself tries for minutes, then ends the process."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--ray_address {address}: must be HOST:PORT as `ray start --head` prints it, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(f"--ray_address {address}: no Ray cluster answers ({error.strerror or error})") from None


def demand(gpus: int, threads: int, machines: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """Return the CPUs and GPUs that every cell asks Ray for, from `CPU` and `GPU` of each machine.

    With a cell's GPUs comes its share of their machine's CPUs; without, as many as it has threads, or as a machine has.

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
