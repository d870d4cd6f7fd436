"""The options of `frcnn doctor`, `frcnn mini-voc` and `frcnn show-data`."""

from dataclasses import dataclass, field

from detector.errors import InputError
from experiments.arguments import (
    DataFormatOptions,
    DataOptions,
    FormatOptions,
    PlotOptions,
    check_least,
    positional,
    some_of,
)

MOST_PICTURES = 2000


@dataclass(frozen=True, kw_only=True)
class CheckDatasetOptions(DataFormatOptions, FormatOptions, PlotOptions):
    """Say what is wrong with a dataset, what each problem does to a training, and what is in it.

    Exit status 1 if something would stop a training. Where splits are given only these are examined, else all files of
    the dataset; which splits must not share images is then told from their names (train, trainval, val, test).

    Args:
        root: As --data.root of frcnn fit.
        data: What is examined.
        no_images: Examine the annotations alone.
        plot: Draw classes, object sizes and aspect ratios into a .png, .pdf or .svg.
    """

    root: str = field(metadata=positional("DATASET_DIR"))
    data: DataOptions = field(
        default_factory=DataOptions,
        metadata=some_of(
            *("train_splits", "val_splits", "test_splits", "image_dirs", "class_names", "bit_depth", "max_pixels")
        ),
    )
    no_images: bool = False


@dataclass(frozen=True, kw_only=True)
class MiniVocOptions:
    """Write a small synthetic dataset in VOC format.

    Args:
        out_dir: Folder to make; an existing equal one is kept.
        images: Number of images: 60 % train, 20 % val, 20 % test.
        seed: Another seed, other images.
    """

    out_dir: str = field(metadata=positional("OUT_DIR"))
    images: int = 300
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ShowDataOptions:
    """Draw a contact sheet of what training is given, without a model.

    Args:
        output: Folder for <augmentation>.png.
        images: Rows: training images, spread over the splits.
        epochs: Columns beside the image itself: epochs 0, 1, ...
    """

    output: str
    images: int = 6
    epochs: int = 4

    def __post_init__(self) -> None:
        """Refuse an empty sheet and an endless one."""
        check_least(self, images=1, epochs=1)
        pictures = self.images * (1 + self.epochs)
        if pictures > MOST_PICTURES:
            raise InputError(
                f"--images {self.images} and --epochs {self.epochs}: {pictures} pictures, the images themselves "
                f"included; a sheet holds {MOST_PICTURES}"
            )
