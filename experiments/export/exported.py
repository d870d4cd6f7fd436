"""An exported file as a detector: images in, detections out, by the runtime that the file is for."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import InputError, brief, shortened
from detector.image_batch import ImageConfig, make_batch
from experiments.export.options import ABOUT, FILES
from experiments.export.programs import KEY, check_packages

Arrays = Sequence[NDArray[Any]]
RUN_BY = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch_export"}
"""The formats of programs, by the suffix of their files."""


def is_exported(path: str | Path) -> bool:
    """Return whether a path is that of an exported program, or of a folder with one."""
    path = Path(path)
    return path.suffix in RUN_BY or (path / ABOUT).is_file()


class ExportedDetector:
    """A detector on the CPU, of a file or of the first program in a folder that `frcnn export` wrote.

    Attributes:
        path: The file.
        about: What is to be known of it.
        class_names: Of labels 1, 2, ...

    Raises:
        InputError: The file is missing, not one that `frcnn export` wrote, or a package that runs it is.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            there = [path / FILES[format] for format in RUN_BY.values() if (path / FILES[format]).is_file()]
            if not there:
                raise InputError(f"{path}: holds none of {', '.join(FILES[format] for format in RUN_BY.values())}")
            path = there[0]
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path, format = path, RUN_BY[path.suffix]
        check_packages(format, str(path), runs=True)
        try:
            self._run, about = {"onnx": _onnx, "openvino": _openvino, "torch_export": _torch_export}[format](path)
        except Exception as error:  # each runtime has kinds of its own
            raise InputError(f"{path}: cannot be read ({shortened(brief(error), 200)})") from error
        if not about:
            raise InputError(f"{path}: was not written by frcnn export: its metadata lack {KEY!r}")
        self.about: Mapping[str, Any] = json.loads(about)
        self.class_names = list(self.about["class_names"])
        kept = {key: self.about["image"][key] for key in ("shortest_side", "longest_side", "pad_multiple")}
        kept["shortest_side"] = [kept["shortest_side"]]
        self._image = ImageConfig(mean=[0.0] * 3, std=[1.0] * 3, pixel_max=255, **kept)

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return detections of images as `FasterRCNN.forward` does, each (3, H, W) RGB in 0..255."""
        batch = make_batch(images, self._image, training=False)
        sizes = (np.array(sizes, dtype=np.float32) for sizes in (batch.sizes, batch.original_sizes))
        boxes, scores, labels, counts = map(torch.as_tensor, self._run([batch.tensors.contiguous().numpy(), *sizes]))
        return [
            {"boxes": boxes[i, :count], "labels": labels[i, :count], "scores": scores[i, :count]}
            for i, count in enumerate(counts.tolist())
        ]


def _onnx(path: Path) -> tuple[Callable[[Arrays], Arrays], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    about = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))), about


def _openvino(path: Path) -> tuple[Callable[[Arrays], Arrays], str]:
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    about = network.get_rt_info([KEY]).astype(str) if network.has_rt_info([KEY]) else ""
    plain = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(network, "CPU", plain)
    return lambda arrays: [*compiled(arrays).values()], about


def _torch_export(path: Path) -> tuple[Callable[[Arrays], Arrays], str]:
    import torchvision  # noqa: F401  # its operators are in the program

    extra = {KEY: ""}
    program = torch.export.load(path, extra_files=extra).module()

    def run(arrays: Arrays) -> Arrays:
        with torch.inference_mode():
            return [found.numpy() for found in program(*map(torch.from_numpy, arrays))]

    return run, extra[KEY]
