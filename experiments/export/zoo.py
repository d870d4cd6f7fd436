"""A detector in a model zoo: its weights as safetensors with all options in their metadata, and a config for fit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from detector.files import write_whole
from detector.training.lightning_module import FasterRCNNModule


def write_weights(module: FasterRCNNModule, path: Path, about: Mapping[str, Any]) -> None:
    """Write the weights of the detector, without those of a training's own."""
    tensors = {name: tensor.contiguous() for name, tensor in module.model.state_dict().items()}
    write_whole(path, save(tensors, metadata={"frcnn": json.dumps(about)}))


def config_of(about: Mapping[str, Any]) -> str:
    """Return a config.yaml with the detector's options, for a training that begins with its weights."""
    options = {key: value for key, value in about["options"].items() if key not in ("weights", "weights_predictor")}
    first = "# frcnn fit --config THIS_FILE --model.weights ITS_FOLDER --data.root FOLDER\n"
    return first + yaml.safe_dump({"model": options}, sort_keys=False)
