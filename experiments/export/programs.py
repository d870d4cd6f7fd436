"""The network of a detector as a file of ONNX, OpenVINO or torch.export, with what is to be known of it inside."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from detector.errors import InputError, brief, shortened
from detector.faster_rcnn import FasterRCNN
from detector.files import PROGRAMS
from detector.use.exported import KEY, check_packages
from experiments.export.network import INPUTS, OUTPUTS, ExportableDetector, suppress_by_torchvision

_WRITES: Final = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_EXAMPLE: Final = (160, 224)
"""Height and width of the images by which a network is traced: what is no multiple of 32 pixels is padded to it."""


def check_writable(format: str) -> None:
    """Raise InputError unless the packages are there that write a format, and run it, to compare."""
    check_packages(_WRITES.get(format, ()), format, f"--format {format}")


def write_program(model: FasterRCNN, format: str, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the network of a detector into a folder, as the file that `PROGRAMS` has for the format.

    Raises:
        InputError: An option of it, or a part of the network, cannot be exported.
    """
    multiple = model.image_config.pad_multiple
    height, width = (-(-side // multiple) * multiple for side in _EXAMPLE)
    sizes = torch.tensor([[height, width - 16], [height - 16, width]], dtype=torch.float32)
    example = (torch.rand(2, 3, height, width) * 255, sizes, sizes * 1.5)
    path, text = folder / PROGRAMS[format], json.dumps(about)
    with _explained():
        if format == "torch_export":
            _write_torch_export(model, example, path, text)
        elif format == "onnx":
            _write_onnx(model, example, path, text)
        else:
            with tempfile.TemporaryDirectory() as draft:
                _write_onnx(model, example, Path(draft) / PROGRAMS["onnx"], text)
                _write_openvino(Path(draft) / PROGRAMS["onnx"], path, text)


@contextmanager
def _explained() -> Iterator[None]:
    """Raise InputError for what a network has that PyTorch cannot export, and keep its warnings to itself."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # PyTorch's many kinds, with pages of text
        raise InputError(f"this network cannot be exported: {shortened(brief(error), 300)}") from error
    finally:
        logging.disable(level)


def _write_torch_export(model: FasterRCNN, example: tuple[Tensor, ...], path: Path, about: str) -> None:
    network, free = ExportableDetector(model, suppress_by_torchvision), torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free}, {0: free}, {0: free})
    with torch.no_grad():
        program = torch.export.export(network, example, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path, extra_files={KEY: about})


def _write_onnx(model: FasterRCNN, example: tuple[Tensor, ...], path: Path, about: str) -> None:
    from experiments.export.onnx_operators import TRANSLATIONS, suppress_in_onnx

    names = {0: "batch"}
    with torch.no_grad():
        program = torch.onnx.export(
            ExportableDetector(model, suppress_in_onnx),
            example,
            dynamo=True,
            dynamic_shapes=({**names, 2: "height", 3: "width"}, names, names),
            custom_translation_table=TRANSLATIONS,
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=18,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[KEY] = about
    program.save(path)


def _write_openvino(source: Path, path: Path, about: str) -> None:
    import openvino

    network = openvino.Core().read_model(source)
    network.set_rt_info(about, [KEY])
    openvino.save_model(network, path, compress_to_fp16=False)
