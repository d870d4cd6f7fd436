"""The options of `frcnn ablate`."""

import argparse
import re
import sys

from experiments.arguments import Parser, quiet


def ablate_command(arguments: list[str]) -> None:
    """Parse the arguments of `frcnn ablate`, and run it."""
    parser = Parser(
        "frcnn ablate",
        description="Train and evaluate every cell of a grid, each as its own process. The same command again skips "
        "what is done, goes on with what was interrupted, and tries again what failed. The launchers ray and slurm "
        "place whole cells; one training over several machines is frcnn fit with --trainer.num_nodes, started by "
        "torchrun or srun.",
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="what varies: see experiments/ablations")
    parser.add_argument("--runs_dir", default="runs", help="folder of all runs; the grid's is in it (runs)")
    parser.add_argument("--jobs", type=int, help="cells at the same time, which share the cores (1)")
    parser.add_argument(
        "--gpus", type=_gpus, metavar="0,1", help="one cell at a time on each; a GPU named twice runs two"
    )
    parser.add_argument("--gpus-per-run", type=int, default=1, help="GPUs of each cell (1)")
    parser.add_argument(
        "--launcher", choices=["local", "ray", "slurm"], default="local", help="what runs the cells (local)"
    )
    parser.add_argument("--ray-address", help="HOST:PORT of a running cluster, or auto; without it Ray starts here")
    parser.add_argument(
        "--slurm",
        type=_mapping,
        default={},
        metavar="{...}",
        help='of submitit: "{slurm_partition: gpu, timeout_min: 60}"; "{cluster: local}" tries it without SLURM',
    )
    parser.add_argument("--dry-run", action="store_true", help="check the grid, and print the commands of its cells")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(table)")
    options = parser.parse_args(arguments)
    from experiments.ablation.ablate import AblateOptions, ablate

    quiet()
    code = ablate(AblateOptions(**vars(options)))
    if code:
        sys.exit(code)


def _gpus(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(re.fullmatch(r"[A-Za-z0-9/-]+", name) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GPUs, such as 0,1")
    return names


def _mapping(text: str) -> dict[str, object]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping, such as {{timeout_min: 60}}")
    return value
