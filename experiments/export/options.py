"""The options of `frcnn export`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from detector.errors import InputError, listed, printable
from detector.files import ABOUT, PROGRAMS, WEIGHTS, check_checkpoint
from experiments.arguments import DataOptions, positional, some_of
from experiments.dataset.data_format import DataFormatOptions

CARD: Final = "README.md"
CONFIG: Final = "config.yaml"
READER: Final = "detect.py"
FILES: Final = {**PROGRAMS, "safetensors": WEIGHTS}


@dataclass(frozen=True, kw_only=True)
class ExportOptions(DataFormatOptions):
    """Write a trained detector as files that run elsewhere, and compare them with it.

    The number of images and their sizes are free. Beside the model: detector.json (class names, sizes, all options),
    detect.py (a reader that needs NumPy, Pillow and the runtime alone), README.md (a model card). With test-time
    augmentation or roi_pool_floor a detector can be written as safetensors only, with soft NMS if hard_nms replaces it.

    Args:
        run: Run folder of frcnn fit, of which the last checkpoint is taken, or a checkpoint.
        format: ONNX and OpenVINO need the extras export and openvino; torch_export is for PyTorch without this package;
            safetensors are the weights, with the detector's options as config.yaml: frcnn fit begins with this folder
            (--config FOLDER/config.yaml --model.weights FOLDER), and frcnn predict takes it as --ckpt_path.
        output: Folder for the files, new or of an earlier export to this format.
        images: Image, or folder of whose images the first 20 are taken, on which the file is compared with the
            detector; by default made-up ones. With int8 also those to calibrate on, then up to 100.
        int8: Convolutions and matrix products of 8 bits (ONNX), with ranges of values as 100 training images have them;
            what that costs in AP on the images to validate on is printed.
        hard_nms: Write a detector whose NMS is another as one with hard NMS at its roi.nms_iou.
        data: Of int8, which are those of the run by default.
        license: What the model card says of the licence of the weights.
    """

    run: str = field(metadata=positional("RUN"))
    format: Literal["onnx", "openvino", "torch_export", "safetensors"] = "onnx"
    output: str
    images: str | None = None
    int8: bool = False
    hard_nms: bool = False
    data: DataOptions = field(
        default_factory=DataOptions,
        metadata=some_of("root", "train_splits", "val_splits", "val_fraction", "split_seed", "image_dirs"),
    )
    license: str = ""

    def __post_init__(self) -> None:
        """Refuse int8 in other formats."""
        if self.int8 and self.format != "onnx":
            raise InputError(f"--int8: is for --format onnx, not {self.format}")


def check_export(options: ExportOptions) -> None:
    """Refuse a run that is not there, and a folder with files of the user's."""
    if not Path(options.run).is_dir():
        check_checkpoint(options.run)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {printable(output)}: is a file; give a folder")
    more = {"openvino": "model.bin", "safetensors": CONFIG}.get(options.format, READER)
    own = {ABOUT, CARD, READER, FILES[options.format], more}
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if others := sorted(there if ABOUT not in there else there - own):
        raise InputError(
            f"--output {printable(output)}: holds {printable(listed(others, 3))}, which an export to {options.format} "
            "does not write; give a new folder"
        )
