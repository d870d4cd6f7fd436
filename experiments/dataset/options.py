"""The options of `frcnn doctor`, `frcnn init`, `frcnn mini-voc` and `frcnn show-data`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detector.errors import InputError
from experiments.arguments import DataOptions, FormatOptions, PlotOptions, check_least, positional, some_of
from experiments.dataset.data_format import DataFormat, DataFormatOptions

MOST_PICTURES = 2000
Network = Literal["resnet50_fpn", "mobilenet_v2_c4", "small_c4"]


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
            *("train_splits", "val_splits", "test_splits", "val_fraction", "split_seed"),
            *("image_dirs", "class_names", "bit_depth", "max_pixels"),
        ),
    )
    no_images: bool = False


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Look at a dataset, and write a config for it that frcnn fit trains at once.

    Its format, classes and splits are found; sizes, anchors, network, batch and length of the training are chosen by
    the objects and by this machine. Comments in the file say why.

    Args:
        root: Folder of the dataset.
        output: File to write; by default <name of the folder>.yaml, here.
        overwrite: Replace a file that is there (--overwrite true).
        data_format: Format of the dataset; by default that which it is recognised as.
        backbone: Network; by default resnet50_fpn on a GPU, else mobilenet_v2_c4, and small_c4 without pretrained
            weights.
        weights: Pretrained weights: auto (ImageNet's, where they are at hand or can be downloaded), none,
            or a file.
        val_fraction: Share of the images to validate on, where no split is for that.
    """

    root: str = field(metadata=positional("DATASET_DIR"))
    output: str | None = None
    overwrite: bool | None = None
    data_format: DataFormat | None = None
    backbone: Network | None = None
    weights: str = "auto"
    val_fraction: float = 0.2

    def __post_init__(self) -> None:
        """Refuse a dataset that is not there, what is no share, and a file that is no config."""
        if not Path(self.root).exists():
            raise InputError(f"{self.root}: no such folder")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"--val_fraction {self.val_fraction}: must be between 0 and 1")
        if self.output is not None and not self.output.endswith((".yaml", ".yml")):
            raise InputError(f"--output {self.output}: the name must end with .yaml")


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
        """Refuse an empty sheet, an endless one, and a picture in place of a folder."""
        if self.output.lower().endswith((".png", ".jpg", ".jpeg")):
            raise InputError(f"--output {self.output}: give a folder; <augmentation>.png is written there")
        check_least(self, images=1, epochs=1)
        pictures = self.images * (1 + self.epochs)
        if pictures > MOST_PICTURES:
            raise InputError(
                f"--images {self.images} and --epochs {self.epochs}: {pictures} pictures, the images themselves "
                f"included; a sheet holds {MOST_PICTURES}"
            )
