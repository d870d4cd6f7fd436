"""What the processes of a run that nobody of them started agree on before they meet: torchrun's, srun's, of machines.

Those that Lightning starts on a machine need none of this: they inherit the environment of the first one.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch.distributed
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.lsf import LSFEnvironment
from lightning_fabric.plugins.environments.mpi import MPIEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from detector.errors import InputError, brief

PATIENCE = timedelta(minutes=30)
"""How long the others wait for the first process, as long as PyTorch does when they meet."""
_stores: list[object] = []
"""What the first process serves, at the address at which PyTorch will serve, too: the second shares the first's."""


def of_first_process(choose: Callable[[], str], nodes: int) -> str:
    """Return what the first of all processes of a run chooses; the others wait for it.

    Args:
        choose: Called in the first process alone.
        nodes: Number of machines, as the Trainer's.

    Raises:
        InputError: The first process refuses, the same in all processes; or they do not find each other.
    """
    environment = _environment()
    by_lightning = isinstance(environment, LightningEnvironment)
    if (nodes if by_lightning else environment.world_size()) < 2:
        return choose()
    if by_lightning and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError(
            f"trainer.num_nodes {nodes}: give MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment, or start the "
            "processes by torchrun or srun"
        )
    first = environment.node_rank() == 0 and environment.local_rank() == 0
    server = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    key = f"frcnn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    where = (environment.main_address, environment.main_port)
    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            *where, is_master=server, timeout=PATIENCE, wait_for_workers=False, multi_tenant=True
        )
        _stores.append(store)
        if not first:
            kind, _, said = store.get(key).decode().partition(" ")
    except torch.distributed.DistError as error:
        raise InputError(
            f"{where[0]}:{where[1]}: the processes of this run do not meet there ({brief(error)})"
        ) from error
    if first:
        try:
            kind, said = "chosen", choose()
        except InputError as error:
            kind, said = "refused", str(error)
        store.set(key, f"{kind} {said}")
    if kind == "refused":
        raise InputError(said)
    return said


def _environment() -> ClusterEnvironment:
    """Return who started the processes, in the order in which Lightning looks."""
    kinds = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    return next((kind() for kind in kinds if kind.detect()), LightningEnvironment())
