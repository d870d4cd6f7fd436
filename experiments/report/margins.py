"""Mean and spread over seeds of each row of a report, as curves and margin charts of TensorBoard."""

import statistics
from pathlib import Path
from typing import Final

from experiments.report.document import MARGIN_TAGS, MARGINS, Report
from experiments.results.runs import RunGroup

FOLDER: Final = "over_seeds"


def write_margins(made: Report) -> list[Path]:
    """Write a TensorBoard run for each row of two seeds or more, into `over_seeds/` of the folder; return the runs.

    A run holds the means over seeds under the tags of the runs' own curves, and the mean less and plus one standard
    deviation, which its layout shows as margin charts. Where seeds have finished, they are of these alone. What was
    written before is replaced.
    """
    from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second to import

    folder = made.grid.folder / FOLDER
    for old in folder.rglob("events.out.tfevents.*"):
        old.unlink()
    layout = {page: {tag: ["Margin", [tag, *_edges(tag)]] for tag in tags} for page, tags in MARGINS.items()}
    written = []
    for cell in made.grid.cells:
        points = {tag: of_tag for tag in MARGIN_TAGS if (of_tag := _points(made, cell, tag))}
        if not points:
            continue
        run = folder / cell.name.replace("/", "_")
        with SummaryWriter(str(run)) as writer:
            writer.add_custom_scalars(layout)
            for tag, of_tag in points.items():
                for step, values in of_tag.items():
                    mean, deviation = statistics.fmean(values), statistics.stdev(values)
                    less, more = _edges(tag)
                    for name, value in ((tag, mean), (less, mean - deviation), (more, mean + deviation)):
                        writer.add_scalar(name, value, step)
        written.append(run)
    return written


def _edges(tag: str) -> tuple[str, str]:
    """Return the tags of the mean less and plus a standard deviation, whose cards are not among the first."""
    part, name = tag.split("/")
    return f"{part}_over_seeds/{name}_less", f"{part}_over_seeds/{name}_more"


def _points(made: Report, cell: RunGroup, tag: str) -> dict[int, list[float]]:
    """Return the values of two seeds or more by step, at the steps that all of them have."""
    curves = [made.curves[run.folder].get(tag) for run in cell.done or cell.runs]
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves if curve is not None]
    if len(by_step) < 2:
        return {}
    common = set.intersection(*(set(of_run) for of_run in by_step))
    return {step: [of_run[step] for of_run in by_step] for step in sorted(common)}
