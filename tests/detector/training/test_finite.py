"""Losses, gradients and weights that are not finite: which is named, and how often a GPU is waited for."""

import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detector.errors import InputError, TrainingError
from detector.training import finite
from detector.training.finite import FiniteLosses, Seen, bad_loss, check_finite, first_not_finite, spoilt


class Waits(TorchFunctionMode):
    """Calls that make a number of a tensor's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("item", "tolist", "__bool__", "__float__", "cpu", "nonzero"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def losses(*values: float) -> dict[str, Tensor]:
    return {f"loss_{i}": torch.tensor(value) for i, value in enumerate(values)}


def seen(name: str, *values: float) -> Seen:
    return Seen([], [{"file_name": part} for part in name.split()], 0, losses(*values))


def test_the_first_bad_batch_is_named() -> None:
    batches = [seen("a.jpg", 1.0, 2.0), seen("b.jpg c\udcff.jpg", 0.5, math.inf, 1.5), seen("d.jpg", math.nan)]
    line = bad_loss(4, batches)
    assert line == "the loss of step 4 is not finite: loss_0 0.5, loss_1 inf, loss_2 1.5; images: b.jpg, c\\xff.jpg"
    assert bad_loss(4, batches[:1]) == bad_loss(4, []) == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_number_in_a_tensor_is_found(value: float, dtype: torch.dtype) -> None:
    state = {
        "a": torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype),  # large is finite
        "count": torch.tensor(3),
        "empty": torch.zeros(0),
        "b": torch.zeros(2, 3, dtype=dtype),
    }
    assert first_not_finite(state) is None
    state["b"][1, 1] = value
    assert first_not_finite(state) == "b"
    with pytest.raises(InputError, match=r"x\.ckpt: its weights are not finite, first b"):
        check_finite("x.ckpt", state)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """`step(callback, loss, gradient, scale=None, others="")`: one step of two parameters; what waited for a GPU."""

    def run(
        callback: FiniteLosses, loss: float, gradient: float, scale: float | None = None, others: str = ""
    ) -> Counter[str]:
        module: Any = nn.Linear(2, 2)
        module.last_losses = losses(1.0, loss)
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        trainer: Any = SimpleNamespace(
            global_step=6, world_size=1, loggers=[], precision_plugin=SimpleNamespace(scaler=scaler)
        )
        monkeypatch.setattr(finite, "_of_all_ranks", lambda _, text: [text, others])
        with Waits() as mode:
            callback.on_train_batch_start(trainer, module, ([], [{"file_name": "a.jpg"}]), 0)
            callback.on_before_backward(trainer, module, torch.tensor(loss))
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            callback.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))
        callback.gradients = [parameter.grad for parameter in module.parameters()]  # type: ignore[attr-defined]
        return mode.calls

    return run


def test_a_gpu_is_waited_for_once_a_step(step: Callable[..., Counter[str]]) -> None:
    assert step(FiniteLosses(), 1.0, 1.0).total() == 1
    step(FiniteLosses(), 1.0, 1e30)  # squares are too large for a float32: it is looked at again


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_or_gradient_stops_at_the_step(step: Callable[..., Counter[str]], bad: float) -> None:
    with pytest.raises(TrainingError, match=rf"loss of step 7 is not finite: loss_0 1, loss_1 {bad}; images: a\.jpg"):
        step(FiniteLosses(), bad, 1.0)
    with pytest.raises(TrainingError, match=r"gradient of step 7 is not finite, first of weight; loss_0 1, loss_1 2;"):
        step(FiniteLosses(), 2.0, bad)


def test_so_many_steps_are_left_out(step: Callable[..., Counter[str]]) -> None:
    callback = FiniteLosses(skip=2)
    for skipped in (1, 2):
        step(callback, 1.0, math.nan)
        assert callback.gradients == [None, None]  # type: ignore[attr-defined]
        assert callback.state_dict() == {"skipped": skipped}
    again = FiniteLosses(skip=2)
    again.load_state_dict(callback.state_dict())
    with pytest.raises(TrainingError):
        step(again, 1.0, math.nan)


def test_overflow_of_scaled_gradients_is_left_to_the_scaler(step: Callable[..., Counter[str]]) -> None:
    callback = FiniteLosses()
    step(callback, 1.0, math.inf, scale=65536.0)
    assert callback.gradients[0] is not None and callback.skipped == 0  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="gradient"):  # nothing is scaled any more
        step(callback, 1.0, math.inf, scale=1.0)
    with pytest.raises(TrainingError, match="loss"):
        step(callback, math.nan, math.nan, scale=65536.0)


def test_a_rank_whose_own_loss_is_well_says_what_the_other_has(step: Callable[..., Counter[str]]) -> None:
    """It sees the other's in the common gradients."""
    with pytest.raises(TrainingError, match="the loss of step 7 of rank 1"):
        step(FiniteLosses(), 1.0, math.nan, others="the loss of step 7 of rank 1")


@pytest.mark.parametrize("value", [0.0, 0.1, 3e38, math.inf, math.nan])
def test_the_gradient_of_a_loss_that_is_not_finite_is_not_either(value: float) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    loss = spoilt(weight + value)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and torch.equal(loss.detach(), weight.detach() + value) == math.isfinite(value)
    assert (float(weight.grad) == 1.0) == math.isfinite(value)
    assert bool(weight.grad.isfinite()) == math.isfinite(value)
