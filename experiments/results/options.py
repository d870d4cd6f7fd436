"""The options of `frcnn evaluate` and `frcnn compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detector.errors import InputError
from experiments.arguments import (
    DataOptions,
    FormatOptions,
    PlotOptions,
    ResampleOptions,
    ScoreOptions,
    positional,
    some_of,
)
from experiments.dataset.data_format import DataFormatOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataFormatOptions, FormatOptions, ResampleOptions, PlotOptions):
    """Score detections, of any detector, against the annotations of splits. Files of detections need no images.

    Args:
        predictions: COCO results (JSON: file_name or image_id, category_name or category_id, bbox xywh, score), or a
            folder of the devkit's comp4_det_test_<class>.txt, or a detector, which detects in the images first, in
            float32: a checkpoint, a run's folder, or what frcnn export wrote (a file or its folder); several are
            evaluated one by one.
        data: The splits: val_splits, or those that val_fraction makes to validate on.
        classes: Score these classes alone, as if there were no others.
        bootstrap: 95 % intervals from so many resamples of the images.
        compare: Other detections on the same images: differences, by paired resamples.
        breakdown: AP50 lost to each kind of error, and in each class.
        plot: Draw the breakdown into a .png, .pdf or .svg.
        proposals: Proposals as COCO results: adds their recall, which detections do not hold.
    """

    predictions: list[str] = field(metadata=positional("PREDICTIONS"))
    data: DataOptions = field(
        metadata=some_of(
            *("val_splits", "train_splits", "test_splits", "val_fraction", "split_seed", "image_dirs", "class_names"),
            required=("root",),
        )
    )
    classes: list[str] | None = None
    bootstrap: int | None = None
    compare: str | None = None
    breakdown: bool = False
    proposals: str | None = None

    def __post_init__(self) -> None:
        """Check what is wrong whatever the files hold."""
        super().__post_init__()
        if self.plot is not None and len(self.predictions) > 1:
            raise InputError(f"--plot {self.plot}: draws one file of predictions, not {len(self.predictions)}")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(FormatOptions, ScoreOptions, ResampleOptions):
    """Show what differs between two runs: B - A.

    Args:
        run_a: Run folder of frcnn fit.
        run_b: Another one, evaluated on the same images.
        output: Draw curves and confusion matrices of both, and the images on which they differ most, into this folder.
        images: How many of these images.
        part: Metrics of which data; by default test, if both were tested, else val.
    """

    run_a: str = field(metadata=positional("RUN_A"))
    run_b: str = field(metadata=positional("RUN_B"))
    output: str | None = None
    images: int = 8
    part: Literal["val", "test"] | None = None
    bootstrap: int = 1000

    def __post_init__(self) -> None:
        """Check what is wrong whatever the runs hold."""
        super().__post_init__()
        if self.images < 0:
            raise InputError(f"--images {self.images}: give how many images are listed, 0 for none")
        for run in (self.run_a, self.run_b):
            if not Path(run).is_dir():
                raise InputError(f"{run}: no such folder; give a run folder of frcnn fit, such as runs/mini_voc/seed0")
        if self.output is not None and Path(self.output).is_file():
            raise InputError(f"--output {self.output}: is a file; give a folder for the pictures")
