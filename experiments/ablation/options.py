"""The options of `frcnn ablate`."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from detector.errors import InputError
from experiments.arguments import FormatOptions, positional


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

    def __post_init__(self) -> None:
        """Check what is wrong whatever the grid holds."""
        if self.gpus is not None and not all(re.fullmatch(r"[A-Za-z0-9/-]+", name) for name in self.gpus):
            raise InputError(f"--gpus {','.join(self.gpus)}: is not a list of GPUs, such as 0,1")
