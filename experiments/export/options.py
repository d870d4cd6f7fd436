"""The options of `frcnn export`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from detector.errors import InputError, listed, printable
from detector.files import check_checkpoint
from experiments.arguments import positional

ABOUT: Final = "detector.json"
CARD: Final = "README.md"
READER: Final = "detect.py"
FILES: Final = {
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "torch_export": "model.pt2",
    "safetensors": "model.safetensors",
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a trained detector as files that run elsewhere, and compare them with it.

    The number of images and their sizes are free. Beside the model: detector.json (class names, sizes, all options),
    detect.py (a reader that needs NumPy, Pillow and the runtime alone), README.md (a model card). With soft NMS,
    test-time augmentation or roi_pool_floor a detector can be written as safetensors only.

    Args:
        run: Run folder of frcnn fit, of which the last checkpoint is taken, or a checkpoint.
        format: ONNX and OpenVINO need the extras export and openvino; torch_export is for PyTorch without this package;
            safetensors are the weights, for frcnn predict --ckpt_path and frcnn fit --model.weights.
        output: Folder for the files, new or of an earlier export to this format.
        images: Image, or folder of whose images the first 20 are taken, on which the file is compared with the
            detector; by default made-up ones.
        license: What the model card says of the licence of the weights.
    """

    run: str = field(metadata=positional("RUN"))
    format: Literal["onnx", "openvino", "torch_export", "safetensors"] = "onnx"
    output: str
    images: str | None = None
    license: str = ""


def check_export(options: ExportOptions) -> None:
    """Refuse a run that is not there, and a folder with files of the user's."""
    if not Path(options.run).is_dir():
        check_checkpoint(options.run)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {printable(output)}: is a file; give a folder")
    own = {ABOUT, CARD, READER, FILES[options.format], "model.bin" if options.format == "openvino" else ""}
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if others := sorted(there if ABOUT not in there else there - own):
        raise InputError(
            f"--output {printable(output)}: holds {printable(listed(others, 3))}, which an export to {options.format} "
            "does not write; give a new folder"
        )
