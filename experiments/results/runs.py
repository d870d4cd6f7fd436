"""What a folder of runs holds: every run with its status and its numbers, grouped into cells of one configuration.

Reads the folder of a grid (`grid.json`, and a `cell.json` in the folder of each run) or any folder of ordinary runs.
Whatever is missing or damaged within a run makes that run a missing or a failed one; the others are read.
"""

import json
import os
import re
import socket
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from jsonargparse import Namespace

from detector.errors import InputError, listed, shown_options
from detector.files import load_yaml, read_cell, read_metrics, read_object
from experiments.output import option_text

STATUSES = ("failed", "running", "interrupted", "unfinished", "pending", "missing", "done")
"""Of a run, worst first: `missing` has no folder yet; `unfinished` is an ordinary run without final numbers, at work or
stopped."""
NOT_COMPARED = (
    *("seed_everything", "run_name", "runs_dir", "experiment", "ckpt_path", "config"),
    *("save_every_minutes", "resume_changed"),
)
"""Options that do not make another configuration of a run."""
RESULTS = ("metrics.json", "checkpoints", "events.out.*")
"""What tells a run from a folder that holds a config.yaml alone."""
MOST_IN_NAMES = 4
"""Options in which ordinary runs differ that are all in a row's name; of more, those that tell the rows apart."""


@dataclass(frozen=True)
class Run:
    """Hold what is known of one training.

    Attributes:
        folder: The run folder; need not be there.
        seed: As planned or recorded; None where neither is known.
        status: One of `STATUSES`.
        error: Why it failed, in one line.
        seconds: How long it took.
        metrics: What metrics.json holds; empty unless there is one.
        config: What config.yaml holds, or what is planned to; empty unless there is either.
    """

    folder: Path
    seed: int | None
    status: str
    error: str | None = None
    seconds: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def metric(self, name: str, part: str) -> float | None:
        """Return a metric; one without a prefix is of the reported part of the data."""
        value = self.metrics.get(name if has_part(name) else f"{part}/{name}")
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class RunGroup:
    """Hold all runs of one configuration: they differ by seed alone.

    Attributes:
        name: `axis=value,...`, or that of the experiment.
        axes: Value labels by axis.
        runs: In the order of the plan; at least one, and one of each seed that is known.
        paper: A published number to stand beside AP50, a fraction.
        repeats: Further runs of these seeds, each with the run that counts instead.
    """

    name: str
    axes: Mapping[str, str]
    runs: tuple[Run, ...]
    paper: float | None = None
    repeats: tuple[tuple[Run, Run], ...] = ()

    @classmethod
    def of(cls, name: str, axes: Mapping[str, str], runs: Sequence[Run], paper: float | None = None) -> Self:
        """Return the group of runs of which several may have one seed: a finished, tested, early one counts."""
        counting: dict[object, Run] = {}
        for run in sorted(runs, key=_rank):
            counting.setdefault(run.folder if run.seed is None else run.seed, run)
        pairs = [(run, counting.get(run.seed, run)) for run in runs]
        kept, repeats = ([pair for pair in pairs if (pair[0] is pair[1]) == one] for one in (True, False))
        return cls(name, axes, tuple(run for run, _ in kept), paper, tuple(repeats))

    @property
    def status(self) -> str:
        """Return `done` if all runs are, else the status of the run that most needs attention."""
        return min((run.status for run in self.runs), key=STATUSES.index)

    @property
    def done(self) -> list[Run]:
        """Return the finished runs."""
        return [run for run in self.runs if run.status == "done"]


@dataclass(frozen=True)
class RunsFolder:
    """Hold the cells of a folder of runs.

    Attributes:
        name: Of the grid, or of the folder.
        folder: Where it is.
        axes: The values of each axis, in the order of the cells.
        cells: At least one.
        baseline: The cell that the others are compared to, if any.
    """

    name: str
    folder: Path
    axes: Mapping[str, Sequence[str]]
    cells: Sequence[RunGroup]
    baseline: RunGroup | None


def read_folder(folder: str | Path, baseline: str | None = None) -> RunsFolder:
    """Read a folder of runs.

    Args:
        folder: With `grid.json`, a grid; else every run folder in it, at any depth, is an ordinary run, and runs whose
            configurations are equal apart from seed, names and paths of results are one cell.
        baseline: Name of the baseline cell, instead of the grid's own.

    Raises:
        InputError: No runs in it, a damaged grid.json, or no such baseline.
    """
    folder = Path(folder)
    name, wanted = folder.resolve().name, baseline
    if (folder / "grid.json").is_file():
        plan = _plan(folder / "grid.json")
        name = str(plan.get("name", name))
        wanted = baseline if baseline is not None else plan.get("baseline")
        cells = list(_planned_cells(folder, plan))
    else:
        cells = _ordinary_cells(folder)
    axes = {axis: [cell.axes[axis] for cell in cells if axis in cell.axes] for cell in cells for axis in cell.axes}
    axes = {axis: list(dict.fromkeys(labels)) for axis, labels in axes.items()}
    return RunsFolder(name, folder, axes, cells, _baseline(folder, cells, wanted))


def read_run(folder: str | Path, finished: bool = True) -> Run:
    """Read one run folder.

    Args:
        folder: The folder.
        finished: Whether there have to be final numbers.

    Raises:
        InputError: It has no config, or lacks final numbers that have to be there.
    """
    folder = Path(folder)
    run, metrics = _read(folder), read_metrics(folder / "metrics.json")
    if not run.config:
        raise InputError(f"{folder}: is no run folder: config.yaml is missing or damaged")
    if finished and isinstance(metrics, str):
        raise InputError(f"{folder / 'metrics.json'}: {metrics}; the run has no final numbers")
    return run


def has_part(name: str) -> bool:
    """Return whether the name of a metric says of which data it is, such as val/AP; a class follows another slash."""
    return "/" in name.split("_class/")[0]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that there are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def deviation(values: Iterable[float | None]) -> float | None:
    """Return the standard deviation of a sample (n - 1); None of fewer than two."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


# ---- grids ----


def _plan(path: Path) -> dict[str, Any]:
    plan = read_object(path, {"cells": list, "paper": dict})
    if isinstance(plan, str):
        raise InputError(f"{path}: {plan}")
    cells = plan.get("cells")
    if not isinstance(cells, list) or not cells:
        raise InputError(f"{path}: names no cells; it should be what frcnn ablate writes")
    for index, cell in enumerate(cells):
        for key, kind in (("name", str), ("axes", dict), ("folder", str)):
            if not isinstance(cell, dict) or not isinstance(cell.get(key), kind):
                raise InputError(f"{path}: cell {index} has no {key}; it should be what frcnn ablate writes")
        if not isinstance(cell.get("seed"), int | None):
            raise InputError(
                f"{path}: cell {index} has the seed {cell['seed']!r}; it should be what frcnn ablate writes"
            )
    return plan


def _planned_cells(folder: Path, plan: Mapping[str, Any]) -> Iterator[RunGroup]:
    paper = plan.get("paper") if isinstance(plan.get("paper"), dict) else {}
    published = {_without_seed(str(key)): value for key, value in (paper or {}).items()}
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in plan["cells"]:
        groups.setdefault(_without_seed(entry["name"]), []).append(entry)
    for name, entries in groups.items():
        axes = {axis: option_text(value) for axis, value in entries[0]["axes"].items() if axis != "seed"}
        # By name, because the whole grid may have been moved since.
        runs = tuple(
            _read(folder / Path(entry["folder"]).name, entry.get("seed"), _planned_config(plan, entry))
            for entry in entries
        )
        yield RunGroup.of(name, axes, runs, _fraction(published.get(name)))


def _planned_config(plan: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.yaml will hold, or would if a cell were a training: it may evaluate another's checkpoint."""
    base, overrides = plan.get("base_options"), entry.get("overrides")
    config = Namespace()  # type: ignore[no-untyped-call]
    if isinstance(base, dict) and isinstance(overrides, dict):
        for key, value in (base | overrides).items():
            config[key] = value
    return config.as_dict()


def _is_gone(record: Mapping[str, Any]) -> bool:
    """Tell whether a process that is recorded as running was one of this machine and is no more."""
    pid = record.get("pid")
    if not isinstance(pid, int) or pid <= 0 or record.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return not isinstance(error, PermissionError)  # else it is another user's
    return False


def _rank(run: Run) -> tuple[bool, bool, str]:
    """Return what sorts runs of one seed: finished ones first, then tested ones, then by when they were started."""
    started = min((path.name for path in run.folder.glob("events.out.*")), default="")
    return run.status != "done", "test/AP50_voc07" not in run.metrics, started


def _without_seed(name: str) -> str:
    return re.sub(r"(^|,)seed=-?\d+", "", name).strip(", ")


def _fraction(number: Any) -> float | None:
    """Return a published number as a fraction; most are given in per cent."""
    if not isinstance(number, int | float) or isinstance(number, bool):
        return None
    return number / 100 if number > 1 else float(number)


def _baseline(folder: Path, cells: Sequence[RunGroup], wanted: Any) -> RunGroup | None:
    if wanted is None:
        return None
    if isinstance(wanted, Mapping):
        wanted = ",".join(f"{axis}={option_text(value)}" for axis, value in wanted.items())
    name = _without_seed(str(wanted))
    for cell in cells:
        if name in (cell.name, ",".join(f"{axis}={label}" for axis, label in cell.axes.items())):
            return cell
    names = listed([cell.name for cell in cells])
    raise InputError(f"{folder}: no cell {name!r} to be the baseline; there are {names}")


# ---- ordinary runs ----


def run_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, at any depth, that hold a run."""
    folders = (path.parent for path in sorted(folder.rglob("config.yaml")))
    return [one for one in folders if any(any(one.glob(name)) for name in RESULTS)]


def _ordinary_cells(folder: Path) -> list[RunGroup]:
    runs = [_read(one) for one in run_folders(folder)]
    if not runs:
        raise InputError(
            f"{folder}: holds no runs (folders with config.yaml, as frcnn fit and frcnn ablate write them)"
        )
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        experiment = str(run.config.get("experiment") or run.folder.resolve().parent.name)
        flat = shown_options(run.config)
        options = {key: value for key, value in flat.items() if key.split(".")[0] not in NOT_COMPARED}
        options |= {"classes": run.metrics["classes"]} if run.metrics.get("classes") else {}  # numbers of these alone
        groups.setdefault((experiment, json.dumps(options, sort_keys=True, default=str)), []).append(run)
    labels = [{key: option_text(value) for key, value in json.loads(text).items()} for _, text in groups]
    keys = sorted({key for label in labels for key in label})
    differing = [key for key in keys if len({label.get(key) for label in labels}) > 1]
    experiments = [experiment for experiment, _ in groups]
    telling = _telling_apart(differing, labels, experiments)
    cells = []
    for experiment, label, members in zip(experiments, labels, groups.values(), strict=True):
        own = {key: label.get(key, "none") for key in dict.fromkeys([*telling, *differing])}
        first = {"experiment": experiment} if len(set(experiments)) > 1 or not own else {}
        named = telling if len(differing) > MOST_IN_NAMES else differing
        text = ", ".join(f"{key.rsplit('.', 1)[-1]}={own[key]}" for key in named)
        name = f"{experiment}: {text}" if experiments.count(experiment) > 1 else experiment
        cells.append(RunGroup.of(name, first | own, members))
    return cells


def _telling_apart(keys: Sequence[str], labels: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """Return few options by which rows of one name differ, those first that tell most of them apart."""
    chosen: list[str] = []
    kinds: list[tuple[object, ...]] = [(name,) for name in names]

    def alike(kinds: Sequence[tuple[object, ...]]) -> int:
        return sum(count**2 for count in Counter(kinds).values())

    while keys and alike(kinds) > len(labels):
        with_key = {key: [(*kind, label.get(key)) for kind, label in zip(kinds, labels, strict=True)] for key in keys}
        best = min(with_key, key=lambda key: alike(with_key[key]))
        if alike(with_key[best]) == alike(kinds):
            break  # 1 and "1" read alike
        chosen, kinds = [*chosen, best], with_key[best]
    return chosen


# ---- one run ----


def _read(folder: Path, seed: int | None = None, planned: Mapping[str, Any] | None = None) -> Run:
    """Read a run folder, which need not be there.

    Args:
        folder: The folder.
        seed: As planned.
        planned: Of a cell of a grid: what stands for a config.yaml that is not there.
    """
    config, metrics = _config(folder) or planned or {}, read_metrics(folder / "metrics.json")
    numbers = {} if isinstance(metrics, str) else _as_reached(metrics, most_proposals(config))
    record: dict[str, Any] | str
    if (folder / "cell.json").is_file():
        record = read_cell(folder / "cell.json")
        if isinstance(record, str):
            record = {"status": "failed", "error": f"cell.json {record}"}
    elif planned is not None:
        record = {"status": "missing"}
    else:
        given = config.get("seed_everything")
        record = {"seed": numbers.get("seed", given if type(given) is int else None)}
        record["status"] = "done" if (folder / "metrics.json").exists() else "unfinished"
    status, error = str(record.get("status")), record.get("error")
    if status not in STATUSES:
        status, error = "failed", f"cell.json has the status {status!r}"
    elif status == "running" and _is_gone(record):
        status, error = "interrupted", "its process is gone"
    elif status == "done":
        status, error = ("failed", f"metrics.json {metrics}") if isinstance(metrics, str) else ("done", None)
    error = None if error is None else _end_of(str(error))
    return Run(folder, record.get("seed", seed), status, error, record.get("seconds"), numbers, config)


def most_proposals(config: Any) -> int | None:
    """Return how many proposals an image has at most in evaluations of a run; None where config.yaml does not tell."""
    for key in ("model", "rpn", "post_nms_test"):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, int) else None


def _as_reached(metrics: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    """Call recalls by the number of proposals that there could be, where an older run says more: one number, one name.

    An evaluation with more proposals than the training had keeps its own.
    """
    named: dict[str, Any] = {}
    for name, value in metrics.items():
        reached = re.sub(r"(?<=@)\d+", lambda k: str(min(int(k[0]), most or int(k[0]))), name)
        if named.setdefault(reached if "/proposal_" in name else name, value) != value:
            return dict(metrics)
    return named


def _config(folder: Path) -> dict[str, Any]:
    try:
        path = folder / "config.yaml"
        content = load_yaml(path.read_text(encoding="utf-8"), path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _end_of(text: str, limit: int = 300) -> str:
    """Return the end of a text in one line: that of a log says the most."""
    text = " ".join(text.split())
    return text if len(text) <= limit else "..." + text[3 - limit :]
