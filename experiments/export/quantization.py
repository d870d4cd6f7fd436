"""`frcnn export --int8`: an ONNX file that computes with 8 bits, and what that costs in average precision."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from datamodules.ground_truth import SplitTruth
from detector.errors import InputError
from detector.use.exported import ExportedDetector
from experiments.arguments import DataOptions
from experiments.dataset.annotations import read_annotations
from experiments.dataset.formats import dataset_format
from experiments.export.evaluated import data_module, detect_split
from experiments.export.network import INPUTS
from experiments.export.options import ExportOptions
from experiments.results.runs import read_run
from experiments.results.scored_runs import data_options
from experiments.results.scores import score
from experiments.run.folder import run_folder_of

CALIBRATED: Final = 100


class Quantization:
    """The data by which a detector is quantised and judged.

    Args:
        options: Name the data, or none.
        checkpoint: Of the detector; in a run's folder it tells the data.

    Raises:
        InputError: No data are known, or anything is wrong with them.
    """

    def __init__(self, options: ExportOptions, checkpoint: Path) -> None:
        self.format, self.data = options.data_format, options.data
        folder = run_folder_of(checkpoint)
        if not self.data.root:
            if folder is None:
                raise InputError("--int8: the checkpoint is in no run folder; give --data.root and --data.val_splits")
            run = read_run(folder, finished=False)
            known = {field.name for field in fields(DataOptions)}
            given = {name: value for name, value in data_options(run).items() if name in known}
            self.format, self.data = run.config.get("data_format") or "voc", DataOptions(**given)
        self.truth: SplitTruth = read_annotations(
            dataset_format(self.format, self.data.root, self.data.image_dirs), self.data, "val"
        )

    def calibration_images(self, bit_depth: int) -> Iterator[Tensor]:
        """Yield training images, evenly spread over them."""
        module = data_module(self.format, self.data, self.truth.class_names, bit_depth)
        module.setup("fit")
        dataset = module.train_dataset
        for index in range(0, len(dataset), -(-len(dataset) // CALIBRATED)):
            yield torch.from_numpy(dataset.sample(index).image).permute(2, 0, 1)

    def quantize(self, path: Path, images: Sequence[Tensor]) -> str:
        """Replace an ONNX file by one with 8 bits, and say what it costs.

        Args:
            path: The file.
            images: To calibrate on; without any, those of the data.
        """
        before = self._scores(path)
        detector = ExportedDetector(path)
        quantize_file(detector, iter(images) if images else self.calibration_images(detector.bit_depth))
        after = self._scores(path)
        lines = (
            f"{name} {before[name]:.4f} -> {after[name]:.4f} ({after[name] - before[name]:+.4f})" for name in before
        )
        splits = ", ".join(self.truth.splits)
        return f"With 8 bits, on the {len(self.truth.image_names)} images of {splits}: {', '.join(lines)}."

    def _scores(self, path: Path) -> Mapping[str, float]:
        scored = score(self.truth, detect_split(path, self.format, self.data, self.truth))
        return {name: scored.values[name] for name in ("AP50_voc", "AP")}


def quantize_file(detector: ExportedDetector, images: Iterator[Tensor]) -> None:
    """Replace the ONNX file of a detector by one whose convolutions and matrix products have 8 bits.

    Weights have a scale for each channel; the ranges of other values are those in the images.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    class Images:
        def get_next(self) -> dict[str, Any] | None:
            image = next(images, None)
            return None if image is None else dict(zip(INPUTS, detector.inputs([image]), strict=True))

    level = logging.root.manager.disable
    draft = detector.path.with_suffix(".partial")
    try:
        logging.disable(logging.WARNING)
        quantize_static(
            detector.path,
            draft,
            Images(),
            per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        draft.replace(detector.path)
    finally:
        logging.disable(level)
        draft.unlink(missing_ok=True)
