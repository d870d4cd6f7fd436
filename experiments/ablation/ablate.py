"""`frcnn ablate`: a grid of trainings by one command, which the same command resumes."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

from datamodules.parallel import available_cores
from detector.errors import InputError, listed
from detector.files import read_metrics, read_object, write_json
from experiments.ablation.cell_folder import CellFolder, shell_line
from experiments.ablation.checks import Checks
from experiments.ablation.grid import Grid, read_grid, setting_name
from experiments.ablation.launcher import Launcher
from experiments.ablation.local_launcher import LocalLauncher
from experiments.ablation.monitor import Monitor, Snapshot
from experiments.ablation.options import AblateOptions
from experiments.ablation.plan import Plan, plan
from experiments.output import counted, json_text, number
from experiments.results.runs import deviation, mean


def ablate(options: AblateOptions) -> int:
    """Run what a grid lacks; return the exit status: 0, 1 if cells have failed, 128 + 15 after SIGTERM.

    Raises:
        InputError: Anything wrong with the grid, its cells, the options or the folder, in one line.
    """
    slots = slots_of(options)
    grid = read_grid(options.grid)
    shown = sys.stderr if options.format == "json" or options.dry_run else sys.stdout
    launcher = None if options.dry_run else _launcher(options, slots)
    planned = plan(grid, options.runs_dir)
    checks = Checks(planned, need_data=launcher is not None, gpus=_gpus_of_a_cell(options))
    if options.launcher == "local" and options.gpus is None and len(slots) > 1 and _gpus_of_a_cell(options):
        checks.lines.append("note: without --gpus every cell sees all GPUs; --gpus 0,1 gives each its own")
    at_a_time = f"{len(slots)} at a time"
    if options.launcher == "ray":
        at_a_time = "as many at a time as the Ray cluster has room for"
    elif options.launcher == "slurm" and len(slots) == 1:
        at_a_time = "as one SLURM array"
    _print_head(planned, checks, at_a_time, shown)
    if launcher is None:
        _print_commands(planned, slots, options.format)
        return 0
    folders = _prepare(planned, checks, shown)
    _look_for_damage(folders, options.redo_damaged, shown)
    with Monitor(planned.grid.name, folders, len(slots), shown) as monitor:
        launcher.run(folders, monitor.tick)
    _print_result(planned, folders, monitor.cells, options.format)
    if launcher.reason is not None:
        reason = f"{launcher.reason}; free some space, then run the same command again"
        print(f"frcnn: {planned.folder}: {reason}", file=sys.stderr)
    if launcher.signal is not None:
        print("frcnn: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGTERM if launcher.signal == signal.SIGTERM else 1
    return int(not all(folder.is_done for folder in folders))


def _launcher(options: AblateOptions, slots: Sequence[Mapping[str, str]]) -> Launcher:
    if options.launcher == "ray":
        from experiments.ablation.ray_launcher import RayLauncher

        return RayLauncher(slots[0], options.gpus_per_run, options.ray_address)
    if options.launcher == "slurm":
        from experiments.ablation.slurm_launcher import SlurmLauncher

        return SlurmLauncher(slots, options.gpus_per_run, options.slurm)
    return LocalLauncher(slots)


def slots_of(options: AblateOptions) -> list[dict[str, str]]:
    """Return the environment of each of the cells that run at the same time.

    Raises:
        InputError: There are no such GPUs.
    """
    if options.gpus is None:
        count = options.jobs or 1
        return [_threads(count) for _ in range(count)]
    names, groups = _device_names(options.gpus), options.gpu_groups
    return [_threads(len(groups)) | {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] for gpu in group)} for group in groups]


def _device_names(gpus: Sequence[str]) -> dict[str, str]:
    """Return how CUDA_VISIBLE_DEVICES has to name each GPU: numbers count those that are visible here."""
    import torch

    there = torch.cuda.device_count()
    if there == 0:
        raise InputError(f"--gpus {','.join(gpus)}: PyTorch finds no GPU here; use --jobs for CPUs")
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    of = f" of CUDA_VISIBLE_DEVICES={','.join(visible)}" if visible else ""
    for gpu in gpus:
        if int(gpu) >= there if gpu.isdecimal() else visible and gpu not in visible:
            raise InputError(f"--gpus {','.join(gpus)}: there is no GPU {gpu}{of}; they are 0 to {there - 1}")
    return {gpu: visible[int(gpu)] if visible and gpu.isdecimal() else gpu for gpu in gpus}


def _gpus_of_a_cell(options: AblateOptions) -> int:
    """Return how many GPUs a cell sees: those of its slot's variable, which without `gpus` is this process's own."""
    if options.launcher != "local" or options.gpus is not None:
        return options.gpus_per_run
    import torch

    return torch.cuda.device_count()


def _threads(runs: int) -> dict[str, str]:
    """Divide the cores fairly, unless OMP_NUM_THREADS says otherwise."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // runs))}


# ---- before ----


def _prepare(planned: Plan, checks: Checks, shown: TextIO) -> list[CellFolder]:
    """Write `grid.json` and the folders of new cells."""
    path = planned.folder / "grid.json"
    before = read_object(path, {"cells": list, "base_options": dict})
    if isinstance(before, str) and path.is_file():
        print(f"{path}: {before}; it is written anew", file=shown)
    if changes := planned.changes(before) if isinstance(before, dict) else []:
        print(
            f"{planned.base}, or the grid's options, have changed since the last run: {'; '.join(changes)}. "
            "The cells that this concerns start anew; what was done before stays in its folders.",
            file=shown,
        )
    folders = [CellFolder(cell.folder) for cell in planned.cells]
    try:
        if renamed := planned.renamed():
            print(f"other names, the same options, so their folders stay: {listed(renamed)}", file=shown)
        if others := planned.others():
            what = f"{counted(len(others), 'earlier cell')} not in the grid any more: {listed(others)}"
            print(f"{what}; the folders stay, and reports leave them out", file=shown)
        planned.folder.mkdir(parents=True, exist_ok=True)
        for folder, cell, steps in zip(folders, planned.cells, checks.steps, strict=True):
            folder.create({**cell.first_state(), "steps": steps})
        write_json(path, planned.document())
    except OSError as error:
        raise InputError(f"{error.filename or planned.folder}: cannot write ({error.strerror})") from None
    return folders


def _look_for_damage(folders: Sequence[CellFolder], redo: bool, shown: TextIO) -> None:
    """Name the finished cells whose results are damaged, and let them run again if asked to."""
    for folder in folders:
        path = folder.path / "metrics.json"
        if folder.is_done and isinstance(wrong := read_metrics(path), str):
            print(f"{path}: {wrong}; " + ("runs again" if redo else "--redo_damaged runs the cell again"), file=shown)
            if redo:
                folder.update(status="interrupted", finished_stages=[])


def _print_head(planned: Plan, checks: Checks, at_a_time: str, shown: TextIO) -> None:
    grid = planned.grid
    sizes = [f"{axis.name} {len(axis.values)}" for axis in grid.axes] + [f"seeds {len(grid.seeds)}"]
    left_out = f", {len(grid.exclude)} combinations left out" if grid.exclude else ""
    known = [steps for steps in checks.steps if steps is not None]
    steps = f"{sum(known):,} training steps" if len(known) == len(checks.steps) else "an unknown number of steps"
    cells = f"{len(planned.cells)} cells ({' x '.join(sizes)}{left_out})"
    first = f"{grid.name}: {cells}, {steps}, {at_a_time}, in {planned.folder}"
    print("\n".join([first, *checks.lines]), file=shown, flush=True)


def _print_commands(planned: Plan, slots: Sequence[Mapping[str, str]], style: str) -> None:
    commands = {cell.name: [shell_line(stage) for stage in cell.stages] for cell in planned.cells}
    if style == "json":
        cells = [{"name": name, "commands": lines} for name, lines in commands.items()]
        print(json_text({"name": planned.grid.name, "environment": slots[0], "cells": cells}))
        return
    print(f"# with {' '.join(f'{name}={value}' for name, value in slots[0].items())}")
    for name, lines in commands.items():
        print("\n".join([f"# {name}", *lines]))


# ---- after ----


def _print_result(planned: Plan, folders: Sequence[CellFolder], ended: Sequence[Snapshot], style: str) -> None:
    if style == "json":
        cells = [
            {"folder": folder.path.name, **folder.read(), "metrics": folder.metrics() or None} for folder in folders
        ]
        print(json_text({"name": planned.grid.name, "folder": str(planned.folder), "cells": cells}))
        return
    if any(cell.status == "done" and cell.metric for cell in ended):
        Console(file=sys.stdout).print(_result_table(planned.grid, ended))
    for cell in ended:
        if cell.status == "failed":
            lines = str(cell.state.get("error", "")).split("\n")
            print("\n    ".join([f"failed: {cell.state['name']} ({cell.folder.log})", *lines]))
    print(f"all of it: frcnn report {planned.folder}", flush=True)


def _result_table(grid: Grid, cells: Sequence[Snapshot]) -> Table:
    """Return mean and standard deviation over seeds of each setting that has a metric."""
    settings: dict[str, list[Snapshot]] = {}
    for cell in cells:
        if cell.status == "done" and cell.metric is not None:
            settings.setdefault(setting_name(cell.state["axes"]), []).append(cell)
    found = {cell.metric[0] for done in settings.values() for cell in done if cell.metric}
    table = Table(*(axis.name for axis in grid.axes), " or ".join(sorted(found)), "std", "seeds")
    if grid.paper:
        table.add_column("paper")
    for setting, done in settings.items():
        values = [cell.metric[1] for cell in done if cell.metric]
        row = [*done[0].state["axes"].values(), number(mean(values), ".4f"), number(deviation(values), ".4f", "")]
        paper = [f"{grid.paper[setting]:.3f}" if setting in grid.paper else ""] if grid.paper else []
        table.add_row(*row, str(len(values)), *paper)
    return table
