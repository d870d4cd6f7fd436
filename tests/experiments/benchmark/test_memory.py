"""Peak memory of a step."""

import pytest
import torch

from experiments.benchmark.measuring import CPU
from experiments.benchmark.memory import StepMemory
from experiments.benchmark.models import build_network, chosen_networks, make_images
from experiments.benchmark.options import InferOptions
from experiments.benchmark.programs import Setting


def test_memory_of_a_step(tiny_config) -> None:
    """More than weights, gradients and momentum, each 4 bytes per weight; less than what torch itself takes."""
    options = InferOptions(config=str(tiny_config), option=["model.backbone.box_head_channels=4000"])
    (network,) = chosen_networks(options)
    weights = sum(p.numel() for p in build_network(network, make_images(network.size, 1, 2, CPU))[0].parameters())
    meter = StepMemory(network, Setting("train", device=CPU))
    meter.known[2, "32-true", False] = 500.0
    peak, per_image = meter.figures(1, "32-true", False)
    assert peak is not None
    assert 3 * 4 * weights / 2**20 < peak < 3 * 4 * weights / 2**20 + 150
    assert per_image == 500 - peak


@pytest.mark.gpu
def test_memory_of_a_step_on_a_gpu(tiny_config) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    (network,) = chosen_networks(InferOptions(config=str(tiny_config)))
    meter, before = StepMemory(network, Setting("train", device=torch.device("cuda"))), torch.cuda.memory_allocated()
    few, many = (meter.peak(number, "32-true", False) for number in (1, 8))
    assert few is not None and many is not None
    assert 0 < few < many
    assert torch.cuda.memory_allocated() - before < few * 2**20
