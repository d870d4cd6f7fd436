"""The options of `frcnn report`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detector.errors import InputError
from experiments.arguments import ResampleOptions, ScoreOptions, positional


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ResampleOptions, ScoreOptions):
    """Print one row per cell of a grid, or per configuration of ordinary runs.

    Metrics over seeds, differences to a baseline, anchors, speed. Works while runs are going on.

    Args:
        runs_dir: Folder of a grid, or any folder that holds run folders.
        format: By default that of the suffix of --output, else table.
        output: Write there instead of printing.
        metrics: Such as "[AP, AP50]".
        baseline: Cell to compare with; by default the grid's own.
        part: Metrics of which data; by default test, if any finished run was tested, else val. Rows that were not
            tested then show val, marked.
        bootstrap: Resamples of the images, for 95 % intervals; 0 for none.
        score_threshold: Of the HTML page's confusion matrices: detections from this score on are counted.
        tensorboard: Also write mean and spread over seeds of each row into over_seeds/ of the folder, as curves and
            margin charts that `frcnn tensorboard` shows beside the runs' own.
    """

    runs_dir: str = field(metadata=positional("RUNS_DIR"))
    format: Literal["table", "json", "csv", "html"] | None = None
    output: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["AP50_voc07"])
    baseline: str | None = None
    part: Literal["val", "test"] | None = None
    bootstrap: int = 1000
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuse a folder that is not there, a single resample, and a folder in place of a file."""
        super(ResampleOptions, self).__post_init__()  # not its own: no resamples are fine here
        if not Path(self.runs_dir).is_dir():
            raise InputError(
                f"{self.runs_dir}: no such folder; give the folder of a grid, or one that holds runs of frcnn fit"
            )
        if self.bootstrap < 2 and self.bootstrap != 0:
            raise InputError(f"--bootstrap {self.bootstrap}: at least 2 resamples, or 0 for no intervals")
        if self.output is not None and Path(self.output).is_dir():
            example = f"{self.output}/report.{self.style}"
            raise InputError(f"--output {self.output}: is a folder; name a file, such as {example}")

    @property
    def style(self) -> str:
        """Return the format that is asked for, or that of the suffix of the output, or else table."""
        suffix = Path(self.output or "").suffix.removeprefix(".")
        return self.format or (suffix if suffix in ("table", "json", "csv", "html") else "table")
