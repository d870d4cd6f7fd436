"""The cells of a grid with everything resolved: options as the command line reads them, hashes, folders, commands."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace

from detector.errors import InputError, brief, flat_options
from detector.files import read_object
from experiments.ablation.cell_folder import CellFolder, State, shell_line
from experiments.ablation.grid import Cell, Grid, Options
from experiments.output import option_text
from experiments.run.folder import run_folder_of
from experiments.run.option_table import with_whole_format
from experiments.run.training_options import OptionsCLI

NOT_HASHED = {
    "config",
    "runs_dir",
    "experiment",
    "run_name",
    "ckpt_path",
    "save_every_minutes",
    "resume_changed",
    "weights_only",
    "trainer.enable_progress_bar",
}
"""Options that say where a run is written and what is shown, not what is trained."""


@dataclass(frozen=True)
class PlannedCell(Cell):
    """A cell that is ready to run: its options, parsed as by `frcnn fit`, its folder and the arguments of its commands.

    The hash is SHA-256 of all options that decide what is trained; of a cell that an earlier version of this package
    began, of those that there were.
    """

    config: Namespace
    hash: str
    folder: Path
    stages: tuple[tuple[str, ...], ...]

    def identity(self) -> State:
        """Return what `grid.json` and `cell.json` both say of the cell."""
        return {"name": self.name, "axes": dict(self.axes), "seed": self.seed, "hash": self.hash}

    def first_state(self) -> State:
        """Return the content of a `cell.json` before anything has run."""
        return {
            **self.identity(),
            "status": "pending",
            "attempts": 0,
            **dict.fromkeys(("host", "pid", "started", "ended")),
            "seconds": 0,
            **dict.fromkeys(("exit_code", "error")),
            "command": " && ".join(shell_line(stage) for stage in self.stages),
            "stages": [list(stage) for stage in self.stages],
            "finished_stages": [],
            "cwd": os.getcwd(),
        }


@dataclass(frozen=True)
class Plan:
    """A grid with everything resolved.

    Attributes:
        grid: The file.
        folder: `<runs dir>/<grid's name>`.
        base: The config file that all cells start from.
        base_options: All options of the base, resolved: name with dots -> value.
        cells: In the order in which they run.
    """

    grid: Grid
    folder: Path
    base: Path
    base_options: Options
    cells: tuple[PlannedCell, ...]

    def document(self) -> dict[str, Any]:
        """Return the content of `grid.json`."""
        return {
            "name": self.grid.name,
            "base": str(self.base),
            "base_hash": _hash(self.base_options),
            "axes": {axis.name: list(axis.values) for axis in self.grid.axes},
            "seeds": list(self.grid.seeds),
            "baseline": self.grid.baseline,
            "paper": dict(self.grid.paper),
            "evaluate": self.grid.evaluate,
            "base_options": self.base_options,
            "cells": [
                {**cell.identity(), "folder": cell.folder.name, "overrides": cell.options} for cell in self.cells
            ],
        }

    def renamed(self) -> list[str]:
        """Return the cells that had another name when they began, before the grid was edited: `old -> new`."""
        names = ((CellFolder(cell.folder).read().get("name", cell.name), cell.name) for cell in self.cells)
        return [f"{old} -> {new}" for old, new in names if old != new]

    def others(self) -> list[str]:
        """Return the names of cells in the grid's folder that are not in the grid, under whatever options."""
        ours, names = {cell.hash for cell in self.cells}, {cell.name for cell in self.cells}
        states = [CellFolder(folder).read() for number, folder in _there(self.folder).items() if number not in ours]
        return sorted(str(state["name"]) for state in states if state["name"] not in names)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """Return what differs from an earlier `grid.json` in cells of the same name: `option: old -> new`."""
        names = {cell.get("name"): cell for cell in before.get("cells") or [] if isinstance(cell, dict)}
        changed: dict[str, None] = {}
        for cell in self.cells:
            old = names.get(cell.name)
            if old is None or old.get("hash") == cell.hash:
                continue
            theirs = dict(before.get("base_options") or {}) | dict(old.get("overrides") or {})
            ours = self.base_options | cell.options
            for option in sorted(theirs.keys() | ours.keys()):
                was, now = (options.get(option, "not there") for options in (theirs, ours))
                if was != now:
                    changed[f"{option}: {option_text(was)} -> {option_text(now)}"] = None
        return list(changed)


def plan(grid: Grid, runs_dir: str) -> Plan:
    """Resolve every cell of a grid.

    Raises:
        InputError: A bad base, an unknown option, a value of the wrong type, two cells with equal options, a missing
            checkpoint.
    """
    checkpoints = {seed: _checkpoint(grid, seed) for seed in grid.seeds}
    base, first = grid.base, checkpoints[grid.seeds[0]]
    if base is None:
        run = run_folder_of(first) if first is not None else None
        if run is None:
            raise InputError(f"{grid.path}: evaluate: {first} is in no run folder; give its config file as base:")
        base = run / "config.yaml"
    base = Path(os.path.relpath(base)) if base.is_relative_to(Path.cwd()) else base
    try:
        parser = OptionsCLI([f"--config={base}"], prog="frcnn fit")
    except ArgumentError as error:
        raise InputError(f"{base}: {error}") from None
    base_options = hashed_options(parser.config)
    digests = {path: _digest(path) for path in set(checkpoints.values()) if path is not None}
    cells: dict[str, PlannedCell] = {}
    there = _there(Path(runs_dir) / grid.name)
    earlier = _planned_before(Path(runs_dir) / grid.name, there)
    defaults = hashed_options(parser.parser.get_defaults())
    for cell in grid.cells():
        options = [f"--{option}={option_text(value)}" for option, value in cell.options.items()]
        arguments = (f"--config={base}", *options, f"--seed_everything={cell.seed}")
        try:
            config = parser.parser.parse_args(with_whole_format(arguments))
        except ArgumentError as error:
            raise InputError(f"{grid.path}: cell {cell.name}: {brief(error)}") from None
        checkpoint = checkpoints[cell.seed]
        digest = _hash(hashed_options(config) | ({} if checkpoint is None else {"evaluate": digests[checkpoint]}))
        number, now = digest, base_options | cell.options
        if digest not in there and checkpoint is None:
            same = (old for old, seed, was in earlier if seed == cell.seed and _grown(was, now, defaults))
            number = next(same, digest)
        folder = there.get(number, Path(runs_dir) / grid.name / f"{cell.name}-{digest[:8]}")
        if len(folder.name.encode()) > 200:
            raise InputError(
                f"{grid.path}: the cell's folder {folder.name} has a name too long; name the values of its axes"
            )
        if digest in cells:
            raise InputError(f"{grid.path}: cells {cells[digest].name} and {cell.name} have equal options")
        last = "test" if config.data.test_splits else "validate"
        stages: tuple[tuple[str, ...], ...]
        if checkpoint is not None:
            stages = ((last, *arguments, f"--ckpt_path={checkpoint}", f"--results_dir={folder}"),)
        else:
            where = (f"--runs_dir={runs_dir}", f"--experiment={grid.name}", f"--run_name={folder.name}")
            stages = (("fit", *arguments, *where), (last, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"))
        cells[digest] = PlannedCell(**vars(cell), config=config, hash=number, folder=folder, stages=stages)
    return Plan(grid, Path(runs_dir) / grid.name, base, base_options, tuple(cells.values()))


def _there(folder: Path) -> dict[str, Path]:
    """Return the folders of cells in a grid's folder, by hash: an axis may have had another name when they began."""
    states = {path.parent: CellFolder(path.parent).read() for path in sorted(folder.glob("*/cell.json"))}
    known = [path for path, state in states.items() if state.get("hash") and state.get("name")]
    known.sort(key=lambda path: states[path].get("status") == "done")  # of two with equal options this one counts
    return {str(states[path]["hash"]): path for path in known}


def _planned_before(folder: Path, there: Mapping[str, Path]) -> list[tuple[Any, Any, Options]]:
    """Return hash, seed and options of each cell as the version of this package that wrote `grid.json` knew them."""
    before = read_object(folder / "grid.json", {"cells": list, "base_options": dict})
    known = before if isinstance(before, dict) else {}
    cells = [cell for cell in known.get("cells") or [] if isinstance(cell, dict) and cell.get("hash") in there]
    base = known.get("base_options") or {}
    return [(cell["hash"], cell.get("seed"), base | (cell.get("overrides") or {})) for cell in cells]


def _grown(before: Options, now: Options, defaults: Options) -> bool:
    """Return whether nothing changed, but that there are more options now, which are at their defaults."""
    new = now.keys() - before.keys()
    return before.items() <= now.items() and all(key in defaults and defaults[key] == now[key] for key in new)


def hashed_options(config: Namespace) -> Options:
    """Return the options that decide the result of a run: name with dots -> plain value."""
    kept = {key: value for key, value in flat_options(config.as_dict()).items() if key not in NOT_HASHED}
    plain: Options = json.loads(json.dumps(kept, default=str))
    return plain


def _checkpoint(grid: Grid, seed: int) -> Path | None:
    if grid.evaluate is None:
        return None
    path = Path(grid.evaluate.replace("{seed}", str(seed)))
    if not os.path.isfile(path):
        raise InputError(f"{grid.path}: evaluate: {path}: no such checkpoint; train it, or name another")
    if "{seed}" not in grid.evaluate and len(grid.seeds) > 1:
        raise InputError(
            f"{grid.path}: evaluate: one checkpoint gives the same numbers for all seeds; write {{seed}} into its path"
        )
    return path


def _hash(options: Options) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
