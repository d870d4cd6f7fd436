"""The weights of a detector as safetensors, with all its options in the file's metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from detector.files import write_whole
from detector.training.lightning_module import FasterRCNNModule


def write_weights(module: FasterRCNNModule, path: Path, about: Mapping[str, Any]) -> None:
    """Write the weights of the detector, without those of a training's own."""
    tensors = {name: tensor.contiguous() for name, tensor in module.model.state_dict().items()}
    write_whole(path, save(tensors, metadata={"frcnn": json.dumps(about)}))
