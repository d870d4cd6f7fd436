"""A dataset format: a CSV file for each split, with a line for each object, beside the images."""

import csv
from collections.abc import Iterator
from pathlib import Path

from datamodules.own_format import LabelledImage, OwnFormat


class CsvFormat(OwnFormat):
    """Read `<split>.csv` with the columns filename, xmin, ymin, xmax, ymax, class; boxes in pixels."""

    def __init__(self, root: str | Path, delimiter: str = ",") -> None:
        super().__init__(root)
        self.delimiter = delimiter

    def splits(self) -> list[str]:
        """Return the names of the files."""
        return sorted(path.stem for path in self.root.glob("*.csv"))

    def images(self, split: str) -> Iterator[LabelledImage]:
        """Give each image of a split once, with all of its objects."""
        with (self.root / f"{split}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter=self.delimiter))
        for name in dict.fromkeys(row["filename"] for row in rows):
            objects = [row for row in rows if row["filename"] == name]
            boxes = [[float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")] for row in objects]
            yield LabelledImage(name, boxes, [row["class"] for row in objects])
