"""The annotations of splits that are named or made, for commands that need no data module."""

from collections.abc import Sequence
from pathlib import Path

from datamodules.dataset_format import DatasetFormat
from datamodules.ground_truth import SplitTruth, read_ground_truth, read_part
from experiments.arguments import DataOptions
from experiments.dataset.formats import made_splits


def read_annotations(format: DatasetFormat, data: DataOptions, part: str, lists: Sequence[Path] = ()) -> SplitTruth:
    """Read the annotations of the splits of a part, named or made; of the latter it is said how.

    Args:
        format: Of the dataset.
        data: Names the splits, or says how they are made.
        part: "train", "val" or "test".
        lists: Folders in which runs may have kept lists of just these splits.

    Raises:
        InputError: As `read_ground_truth`.
    """
    made = made_splits(format, data)
    if made is None:
        option = f"{part}_splits"
        return read_ground_truth(format, getattr(data, option) or [], data.class_names, f"--data.{option}")
    for folder in lists:
        made.take_lists(folder)
    truth = read_part(made, part, data.class_names)
    made.keep()
    return truth
