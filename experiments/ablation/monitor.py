"""Shows a grid while it runs, from the files of its cells: one live table, or plain lines without a terminal."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.ablation.cell_folder import CellFolder, State
from experiments.output import duration

METRICS = ("test/AP50_voc07", "val/AP50_voc07")
STYLES = {"running": "cyan", "done": "green", "failed": "bold red", "interrupted": "yellow", "pending": "dim"}
IMPORTANT_FIRST = ("running", "failed", "interrupted", "done", "pending")


@dataclass(frozen=True)
class Snapshot:
    """Hold what the files of a cell say: `cell.json`, the first of `METRICS` that there is, and a training's step."""

    folder: CellFolder
    state: State
    metric: tuple[str, float] | None
    step: int | None

    @property
    def status(self) -> str:
        """Return the status in `cell.json`."""
        status = self.state.get("status")
        return status if status in STYLES else "pending"

    @property
    def work(self) -> float:
        """Return the work of the cell in steps; 1 where they are not known."""
        return float(self.state.get("steps") or 1)

    @property
    def time(self) -> str:
        """Return what all attempts took; nothing before the first has ended."""
        return duration(self.state["seconds"]) if self.state.get("seconds") else ""


def look_at(folder: CellFolder) -> Snapshot:
    """Read a cell's files."""
    state = folder.read()
    progress = folder.progress() if state.get("status") in ("running", "interrupted") else {}
    numbers = progress | folder.metrics()
    found = [(name, float(numbers[name])) for name in METRICS if numbers.get(name) is not None]
    return Snapshot(folder, state, found[0] if found else None, progress.get("step"))


class Monitor:
    """What watches the cells of a grid, and shows how far they are: in a live table if `out` is a terminal."""

    def __init__(self, name: str, folders: Sequence[CellFolder], parallel: int, out: TextIO) -> None:
        self.name = name
        self.parallel = parallel
        self.cells = [look_at(folder) for folder in folders]
        self._console = Console(file=out)
        self._live: Live | None = None
        self._looked = 0.0

    def __enter__(self) -> "Monitor":
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Look, twice a second."""
        if time.monotonic() - self._looked >= 0.5:
            self.look()

    def look(self) -> None:
        """Read all cells that are not done; tell what has changed."""
        self._looked = time.monotonic()
        before = self.cells
        # Of a state that is damaged meanwhile, the former one is shown.
        looks = (cell if cell.status == "done" else look_at(cell.folder) for cell in before)
        self.cells = [new if new.state else old for old, new in zip(before, looks, strict=True)]
        for old, new in zip(before, self.cells, strict=True):
            if (old.status, old.state.get("attempts")) != (new.status, new.state.get("attempts")):
                self._tell(new)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def summary(self) -> str:
        """Return counts, and the time that is left."""
        count = {status: sum(cell.status == status for cell in self.cells) for status in STYLES}
        parts = [f"{count['done']} of {len(self.cells)} done", f"{count['running']} running"]
        parts += [f"{count[status]} {status}" for status in ("failed", "interrupted") if count[status]]
        left = self.remaining()
        return ", ".join(parts) + ("" if left is None else f", about {duration(left)} left")

    def remaining(self) -> float | None:
        """Return the seconds until all cells that have not failed are done; None before one is, and at the end."""
        done = [cell for cell in self.cells if cell.status == "done" and cell.time]
        left = [cell for cell in self.cells if cell.status not in ("done", "failed")]
        if not done or not left:
            return None
        pace: float = sum(cell.state["seconds"] for cell in done) / sum(cell.work for cell in done)
        work = sum(max(0.0, cell.work - (cell.step or 0)) for cell in left)
        running = sum(cell.status == "running" for cell in left)
        return pace * work / max(1, min(len(left), max(self.parallel, running)))

    def _tell(self, cell: Snapshot) -> None:
        """Print one line on a change; a failure with the end of its log."""
        name, status, style = cell.state.get("name", "?"), cell.status, ""
        if status == "failed":
            lines = [f"failed: {name}", *str(cell.state.get("error", "")).split("\n"), f"(log: {cell.folder.log})"]
            text, style = "\n    ".join(lines), "red"
        elif self._live is None:
            metric = f": {cell.metric[0]} {cell.metric[1]:.4f}" if cell.metric and status == "done" else ""
            took = f" ({duration(cell.state['seconds'])})" if status == "done" else ""
            text = f"{status}: {name}{metric}{took}; {self.summary()}"
        else:
            return
        self._console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def _table(self) -> Group:
        """Show as many cells as a terminal has room for, in the order of the grid: those that matter now."""
        axes = list(self.cells[0].state.get("axes", {})) if self.cells else []
        table = Table(*axes, "seed", "status", "step", "AP50_voc07", "time")
        room = max(4, self._console.size.height - 8)
        ranked = sorted(range(len(self.cells)), key=lambda i: (IMPORTANT_FIRST.index(self.cells[i].status), i))
        for cell in [self.cells[index] for index in sorted(ranked[:room])]:
            table.add_row(
                *(str(cell.state["axes"].get(axis, "")) for axis in axes),
                str(cell.state.get("seed", "")),
                Text(cell.status, style=STYLES.get(cell.status, "")),
                f"{cell.step}/{cell.state.get('steps') or '?'}" if cell.step is not None else "",
                f"{cell.metric[1]:.4f} ({cell.metric[0].split('/')[0]})" if cell.metric else "",
                cell.time,
            )
        hidden = len(self.cells) - room
        more = [Text(f"({hidden} more cells)")] if hidden > 0 else []
        return Group(table, *more, Text(f"{self.name}: {self.summary()}"))
