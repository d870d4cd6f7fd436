"""Shows a grid while it runs, from the files of its cells: one live table, or plain lines without a terminal."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.ablation.cell_folder import CellFolder, State
from experiments.output import duration

METRICS = ("test/AP50_voc07", "val/AP50_voc07")
STYLES = {"running": "cyan", "done": "green", "failed": "bold red", "interrupted": "yellow", "pending": "dim"}


@dataclass(frozen=True)
class CellView:
    """What is shown of a cell.

    Attributes:
        state: Its `cell.json`.
        metric: Name and value of the first of `METRICS` that there is.
        step: Reached by a training that goes on.
    """

    state: State
    metric: tuple[str, float] | None
    step: int | None

    @property
    def status(self) -> str:
        """Of `cell.json`."""
        return str(self.state.get("status", "pending"))

    @property
    def work(self) -> float:
        """In steps, or 1 for a cell whose steps are not known."""
        return float(self.state.get("steps") or 1)


def view(folder: CellFolder) -> CellView:
    """Read a cell's files."""
    state = folder.read()
    running = state.get("status") in ("running", "interrupted")
    progress = folder.progress() if running else {}
    numbers = progress | folder.metrics()
    found = [(name, float(numbers[name])) for name in METRICS if numbers.get(name) is not None]
    return CellView(state, found[0] if found else None, progress.get("step"))


class Monitor:
    """Watches the cells of a grid.

    Args:
        name: Of the grid.
        folders: Of its cells.
        parallel: How many run at the same time.
        out: Where to show; a live table if this is a terminal.
        seconds: Between two looks.
    """

    def __init__(
        self, name: str, folders: Sequence[CellFolder], parallel: int, out: TextIO, seconds: float = 0.5
    ) -> None:
        self.name = name
        self.folders = list(folders)
        self.parallel = parallel
        self.seconds = seconds
        self._console = Console(file=out)
        self._live: Live | None = None
        self._views: list[CellView] = []
        self._statuses: list[tuple[str, Any]] = []
        self._looked = 0.0

    def __enter__(self) -> "Monitor":
        self._views = [view(folder) for folder in self.folders]
        self._statuses = [(cell.status, cell.state.get("attempts")) for cell in self._views]
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Look, if it is time to."""
        if time.monotonic() - self._looked >= self.seconds:
            self.look()

    def look(self) -> None:
        """Read all cells; tell what has changed."""
        self._looked = time.monotonic()
        # What is done stays so.
        self._views = [
            old if old.status == "done" else view(folder) for old, folder in zip(self._views, self.folders, strict=True)
        ]
        statuses = [(cell.status, cell.state.get("attempts")) for cell in self._views]
        for cell, before, after in zip(self._views, self._statuses, statuses, strict=True):
            if before != after:
                self._tell(cell)
        self._statuses = statuses
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def summary(self) -> str:
        """Counts, and the time that is left."""
        count = {status: sum(cell.status == status for cell in self._views) for status in STYLES}
        parts = [f"{count['done']} of {len(self._views)} done", f"{count['running']} running"]
        parts += [f"{count[status]} {status}" for status in ("failed", "interrupted") if count[status]]
        left = self.remaining()
        return ", ".join(parts) + ("" if left is None else f", about {duration(left)} left")

    def remaining(self) -> float | None:
        """Seconds until all cells that have not failed are done, from those that are; None before the first
        and after the last."""
        done = [cell for cell in self._views if cell.status == "done" and cell.state.get("seconds")]
        if not done:
            return None
        pace: float = sum(cell.state["seconds"] for cell in done) / sum(cell.work for cell in done)
        left = [cell for cell in self._views if cell.status not in ("done", "failed")]
        if not left:
            return None
        work = sum(max(0.0, cell.work - (cell.step or 0)) for cell in left)
        running = sum(cell.status == "running" for cell in left)
        return pace * work / max(1, min(len(left), max(self.parallel, running)))

    def _tell(self, cell: CellView) -> None:
        """One line on a change; a failure with the end of its log."""
        name, status = cell.state.get("name", "?"), cell.status
        if status == "failed":
            lines = [f"failed: {name}", *str(cell.state.get("error", "")).split("\n"), f"(log: {self._log(cell)})"]
            self._print("\n    ".join(lines), "red")
        elif self._live is None:
            metric = f": {cell.metric[0]} {cell.metric[1]:.4f}" if cell.metric and status == "done" else ""
            took = f" ({duration(cell.state['seconds'])})" if status == "done" else ""
            self._print(f"{status}: {name}{metric}{took}; {self.summary()}", None)

    def _log(self, cell: CellView) -> str:
        return next(str(f.log) for f, v in zip(self.folders, self._views, strict=True) if v is cell)

    def _print(self, text: str, style: str | None) -> None:
        self._console.print(Text(text, style=style or ""), soft_wrap=True, highlight=False)

    def _table(self) -> Group:
        axes = list(self._views[0].state.get("axes", {})) if self._views else []
        table = Table(*axes, "seed", "status", "step", "AP50_voc07", "time")
        shown, hidden = self._fitting()
        for cell in shown:
            table.add_row(
                *(str(cell.state["axes"].get(axis, "")) for axis in axes),
                str(cell.state.get("seed", "")),
                Text(cell.status, style=STYLES.get(cell.status, "")),
                f"{cell.step}/{cell.state.get('steps') or '?'}" if cell.step is not None else "",
                f"{cell.metric[1]:.4f} ({cell.metric[0].split('/')[0]})" if cell.metric else "",
                duration(cell.state["seconds"]) if cell.state.get("seconds") else "",
            )
        more = [Text(f"({hidden} more cells)")] if hidden else []
        return Group(table, *more, Text(f"{self.name}: {self.summary()}"))

    def _fitting(self) -> tuple[list[CellView], int]:
        """The cells that a terminal has room for, those that matter now first, in the order of the grid."""
        room = max(4, self._console.size.height - 8)
        order = {"running": 0, "failed": 1, "interrupted": 2, "done": 3, "pending": 4}
        ranked = sorted(range(len(self._views)), key=lambda i: (order.get(self._views[i].status, 5), i))
        kept = sorted(ranked[:room])
        return [self._views[i] for i in kept], len(self._views) - len(kept)


def mean_over_seeds(views: Sequence[CellView]) -> list[tuple[dict[str, str], str, float, float | None, int]]:
    """For each setting with a metric: axes, its name, mean, standard deviation (None of one), number of seeds."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[str, float]]] = {}
    for cell in views:
        if cell.status == "done" and cell.metric is not None:
            groups.setdefault(tuple(cell.state["axes"].items()), []).append(cell.metric)
    rows = []
    for axes, metrics in groups.items():
        values = [value for _, value in metrics]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        rows.append((dict(axes), metrics[0][0], statistics.mean(values), deviation, len(values)))
    return rows
