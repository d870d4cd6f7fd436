"""What `fit`, `validate` and `test` print at their end: the numbers, where everything is, and what to do next."""

import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from detector.errors import printable
from detector.training.callbacks.progress import main_metrics
from experiments.output import number

FAMILIES = {"VOC": "AP50_voc", "COCO": "A", "proposals": "proposal_", "others": ""}
"""Of metrics, and how the names of each one's begin; the first that fits is theirs."""
OF_CLASS = "AP50_voc_class/"


def print_evaluation(metrics: Mapping[str, float], stage: str, folder: str | None) -> None:
    """Print the metrics of an evaluation with three digits, by family and by class.

    Args:
        metrics: All that was logged.
        stage: `val` or `test`, with which their names begin.
        folder: The run folder as it is shown, whose metrics.json holds all digits; None where nothing is written.
    """
    values = {name.removeprefix(f"{stage}/"): value for name, value in metrics.items() if name.startswith(f"{stage}/")}
    columns: dict[str, list[tuple[str, float]]] = {family: [] for family in FAMILIES}
    for name, value in values.items():
        if not name.startswith(OF_CLASS):
            family = next(family for family, beginning in FAMILIES.items() if name.startswith(beginning))
            columns[family].append((name.removeprefix("proposal_"), value))
    console = Console(highlight=False)
    families = [(family, "", pairs) for family, pairs in columns.items() if pairs]
    wide = console.measure(_side_by_side(families), options=console.options.update(width=1000)).maximum >= console.width
    for group in (families[:-1], families[-1:]) if wide else (families,):
        if group:
            console.print(_side_by_side(group))
    classes = [(name.removeprefix(OF_CLASS), value) for name, value in values.items() if name.startswith(OF_CLASS)]
    if classes:
        console.print(_class_table(classes, console.width))
    if folder is not None:
        print(f"all digits: {printable(folder)}/metrics.json")


def print_training(
    metrics: Mapping[str, float | None], lines: Iterable[tuple[str, str]], commands: Sequence[Sequence[str]]
) -> None:
    """Print the main metrics of a training, lines about the run, and commands that go on from it.

    Args:
        metrics: The content of metrics.json.
        lines: What a line is about, and the line.
        commands: The words of each; a command too long for the terminal goes on in further lines, as a shell takes it.
    """
    console = Console(highlight=False)
    recall = [name for name in main_metrics(metrics, "val") if "@" in name]
    names = [*(f"val/{name}" for name in ("AP50_voc07", "AP50_voc", "AP", "AP50", "AP75")), *recall, "train/loss"]
    table = Table("at the end of the training", Column("value", justify="right"))
    for name in (name for name in names if name in metrics):
        table.add_row(name, number(metrics[name], ".3f"))
    if table.row_count:
        console.print(table)
    for what, text in lines:
        print(f"{what:16} {printable(text)}")
    print("next:")
    for words in commands:
        print(_command_text(words, console.width))


def program() -> list[str]:
    """Return how `frcnn` is called from the current folder."""
    path = Path(sys.executable).absolute().parent / "frcnn"
    if not path.is_file():
        return [sys.executable, "-m", "experiments.cli"]
    return ["frcnn"] if shutil.which("frcnn") == str(path) else [shown_path(path)]


def shown_path(path: str | Path) -> str:
    """Return a path from the current folder on, if it is in there."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _side_by_side(columns: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]) -> Table:
    """Return a table of pairs of columns, each with the header of its names, that of its values, and what is in it."""
    table = Table()
    for header, of_values, _ in columns:
        table.add_column(header)
        table.add_column(of_values, justify="right")
    for row in zip_longest(*(pairs for _, _, pairs in columns)):
        table.add_row(*(cell for pair in row for cell in _cells(pair)))
    return table


def _class_table(classes: Sequence[tuple[str, float]], width: int) -> Table:
    """Return a table with as many classes beside each other as there is room for, one below the other in columns."""
    longest = max(len("class"), *(cell_len(printable(name)) for name, _ in classes))
    beside = max(1, (width - 1) // (longest + len("AP50_voc") + 6))
    rows = math.ceil(len(classes) / beside)
    return _side_by_side(
        [("class", "AP50_voc", classes[start : start + rows]) for start in range(0, len(classes), rows)]
    )


def _cells(pair: tuple[str, float] | None) -> tuple[str, str]:
    return ("", "") if pair is None else (escape(printable(pair[0])), number(pair[1], ".3f"))


def _command_text(words: Sequence[str], width: int) -> str:
    quoted = [shlex.quote(word) for word in words]
    line = "  " + " ".join(quoted)
    if len(line) < width:
        return line
    return line.replace(" --", " \\\n      --")
