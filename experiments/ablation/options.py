"""The options of `frcnn ablate`."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from detector.errors import InputError
from experiments.arguments import FormatOptions, check_least, positional


@dataclass(frozen=True, kw_only=True)
class AblateOptions(FormatOptions):
    """Train and evaluate every cell of a grid, each as its own process.

    The same command again skips what is done, goes on with what was interrupted, and tries again what failed. The
    launchers ray and slurm place whole cells; one training over several machines is frcnn fit with
    --trainer.num_nodes, started by torchrun or srun.

    Args:
        grid: What varies: see experiments/ablations.
        runs_dir: Folder of all runs; the grid's is in it.
        jobs: Cells at the same time, which share the cores; by default 1.
        gpus: "0,1": one cell at a time on each; a GPU named twice runs two.
        gpus_per_run: GPUs of each cell.
        launcher: What runs the cells.
        ray_address: HOST:PORT of a running cluster, or auto; without it Ray starts here.
        slurm: Of submitit: "{slurm_partition: gpu, timeout_min: 60}"; "{cluster: local}" tries it without SLURM.
        dry_run: Check the grid, and print the commands of its cells.
        redo_damaged: Run again what was done where its results are damaged now; without it such cells are named.
    """

    grid: str = field(metadata=positional("GRID.yaml"))
    runs_dir: str = "runs"
    jobs: int | None = None
    gpus: list[str] | None = None
    gpus_per_run: int = 1
    launcher: Literal["local", "ray", "slurm"] = "local"
    ray_address: str | None = None
    slurm: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    redo_damaged: bool = False

    def __post_init__(self) -> None:
        """Check what is wrong whatever the grid holds."""
        given = f"--gpus {','.join(self.gpus or ())}"
        if not all(re.fullmatch(r"[A-Za-z0-9/-]+", name) for name in self.gpus or ()):
            raise InputError(f"{given}: is not a list of GPUs, such as 0,1")
        if self.launcher != "local" and self.gpus is not None:
            raise InputError(f"--gpus: --launcher {self.launcher} places cells itself; give --gpus_per_run")
        if self.ray_address is not None and self.launcher != "ray":
            raise InputError("--ray_address: without effect; add --launcher ray")
        if self.slurm and self.launcher != "slurm":
            raise InputError("--slurm: without effect; add --launcher slurm")
        check_least(self, gpus_per_run=1, jobs=1)
        if self.jobs is not None and self.gpus is not None:
            raise InputError(
                "--jobs: without effect beside --gpus; to run two cells on a GPU name it twice: --gpus 0,0"
            )
        if any(len(set(group)) < self.gpus_per_run for group in self.gpu_groups):
            raise InputError(f"{given}: does not divide into groups of {self.gpus_per_run} different GPUs")

    @property
    def gpu_groups(self) -> list[list[str]]:
        """Return the GPUs of each of the cells that run at the same time."""
        gpus, size = self.gpus or [], self.gpus_per_run
        return [gpus[start : start + size] for start in range(0, len(gpus), size)]
