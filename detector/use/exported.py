"""An exported file as a detector: images in, detections out, by the runtime that the file is for."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import InputError, brief, shortened
from detector.files import PROGRAMS
from detector.image_batch import ImageConfig, make_batch
from detector.roi_heads import RoIConfig
from detector.use.program_check import check_program, weights_only

Arrays = Sequence[NDArray[Any]]
KEY: Final = "frcnn"
"""Of what is to be known, in the metadata of a file."""
RUNTIMES: Final = {"onnx": "onnxruntime", "openvino": "openvino"}


def check_packages(packages: Sequence[str], format: str, where: object) -> None:
    """Raise InputError, beginning with `where`, unless packages that a format needs are there."""
    if missing := [name for name in packages if find_spec(name) is None]:
        extra = "openvino" if format == "openvino" else "export"
        install = f"pip install 'faster-rcnn-lightning[{extra}]'"
        raise InputError(f"{where}: needs {', '.join(missing)}, not installed; {install}")


class ExportedDetector:
    """A detector on the CPU, of a file that `frcnn export` wrote.

    Attributes:
        path: The file.
        about: What is to be known of it.
        class_names: Of labels 1, 2, ...
        bit_depth: Of the values in 16-bit images.
        image_config: The sizes of images that it takes.
        roi: The thresholds of its own NMS.
        device: Where it computes.

    Raises:
        InputError: The file is missing, not one that `frcnn export` wrote, or a package that runs it is.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        format = next(format for format, file in PROGRAMS.items() if file.endswith(self.path.suffix))
        if not self.path.is_file():
            raise InputError(f"{path}: no such file")
        check_packages([RUNTIMES[format]] if format in RUNTIMES else [], format, path)
        try:
            self._run, about = {"onnx": _onnx, "openvino": _openvino, "torch_export": _torch_export}[format](self.path)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # each runtime has kinds of its own
            raise InputError(f"{path}: cannot be read ({shortened(brief(error), 200)})") from error
        try:
            self.about: Mapping[str, Any] = json.loads(about)
            self.class_names = [str(name) for name in self.about["class_names"]]
            self.bit_depth = int(self.about["bit_depth"])
            image, roi = self.about["image"], self.about["options"]["roi"]
            limits = {key: image[key] for key in ("longest_side", "pad_multiple")}
            self.image_config = ImageConfig(
                [image["shortest_side"]], mean=[0.0] * 3, std=[1.0] * 3, pixel_max=255, **limits
            )
            self.roi = RoIConfig(**{key: roi[key] for key in ("score_threshold", "nms_iou", "detections_per_image")})
        except Exception as error:  # no JSON, or anything else in it
            why = f"{type(error).__name__}: {shortened(brief(error), 100)}" if about else f"its metadata lack {KEY!r}"
            raise InputError(f"{path}: was not written by this version of frcnn export ({why})") from error

    def eval(self) -> Self:
        """Return it: it always is in evaluation."""
        return self

    def to(self, device: torch.device) -> Self:
        """Return it, for the CPU.

        Raises:
            RuntimeError: Another device.
        """
        if device.type != "cpu":
            raise RuntimeError(f"{self.path} computes on the CPU")
        return self

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return detections of images as `FasterRCNN.forward` does, each (3, H, W) RGB in 0..255."""
        boxes, scores, labels, counts = map(torch.as_tensor, self._run(self.inputs(images)))
        return [
            {"boxes": boxes[i, :count], "labels": labels[i, :count], "scores": scores[i, :count]}
            for i, count in enumerate(counts.tolist())
        ]

    def inputs(self, images: Sequence[Tensor]) -> list[NDArray[Any]]:
        """Return what the file takes of images: their batch (B, 3, H, W), and their sizes in it and before (B, 2)."""
        batch = make_batch(images, self.image_config, training=False)
        sizes = (np.array(sizes, dtype=np.float32) for sizes in (batch.sizes, batch.original_sizes))
        return [batch.tensors.contiguous().numpy(), *sizes]


def _onnx(path: Path) -> tuple[Callable[[Arrays], Arrays], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside PyTorch's threads all were slow
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

    check_program(path)
    extra = {KEY: ""}
    with weights_only():
        program = torch.export.load(path, extra_files=extra).module()

    def run(arrays: Arrays) -> Arrays:
        with torch.inference_mode():
            return [found.numpy() for found in program(*map(torch.from_numpy, arrays))]

    return run, extra[KEY]
