"""The parts of a step are the step."""

import pytest
import torch

from experiments.benchmark.measuring import CPU
from experiments.benchmark.programs import autocast, our_optimizer
from experiments.benchmark.step_parts import training_parts


@pytest.mark.parametrize("pair", ["resnet18_fpn", "mobilenet_v2_c4"], indirect=True)
def test_parts_of_a_step_give_its_gradients(pair) -> None:
    _, model, _, (images, targets) = pair
    model.train().zero_grad()
    model.losses(images, targets)["loss"].backward()
    whole = {n: parameter.grad.clone() for n, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    times = training_parts(model, (images, targets), our_optimizer(model), autocast("32-true", CPU))
    parts = {n: parameter.grad for n, parameter in model.named_parameters() if parameter.grad is not None}
    assert parts.keys() == whole.keys()
    assert len(whole) == sum(parameter.requires_grad for parameter in model.parameters())
    for n, gradient in whole.items():
        torch.testing.assert_close(parts[n], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-9)
    assert len(times) == 9
    assert min(times.values()) > 0
