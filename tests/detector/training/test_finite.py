"""Losses and weights that are not finite: which is named, and how often a GPU would be waited for."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from detector.errors import InputError, TrainingError
from detector.training.finite import FiniteLosses, check_finite, first_bad, first_not_finite


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


def test_the_first_bad_batch_is_named() -> None:
    seen = [
        (3, ["a.jpg"], losses(1.0, 2.0)),
        (4, ["b.jpg", "c\udcff.jpg"], losses(0.5, math.inf, 1.5)),  # of another step of an alternating training
        (5, ["d.jpg"], losses(math.nan, 2.0)),
    ]
    found = first_bad(seen)
    assert found is not None
    assert found[0] == 4
    assert "step 4 is not finite: loss_0 0.5, loss_1 inf, loss_2 1.5; images: b.jpg, c\\xff.jpg;" in found[1]
    assert first_bad(seen[:1]) is None
    assert first_bad([]) is None


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


def trainer(**changes: Any) -> Any:
    return SimpleNamespace(**{"global_step": 0, "world_size": 1, "sanity_checking": False} | changes)


def test_a_gpu_is_waited_for_once_in_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FiniteLosses, "_at_once", staticmethod(lambda *_: False))
    callback, module, running = FiniteLosses(every_n_batches=4), SimpleNamespace(), trainer()
    waits = []
    with pytest.raises(TrainingError, match=r"step 7 is not finite: loss_0 nan; images: 6\.jpg"):
        for batch in range(20):
            module.last_losses = losses(math.nan if batch == 6 else 1.0)
            running.global_step = batch
            with Waits() as mode:
                callback.on_train_batch_start(running, module, ([], [{"file_name": f"{batch}.jpg"}]), batch)
                callback.on_before_backward(running, module, torch.tensor(1.0))
                try:
                    callback.on_train_batch_end(running, module, None, None, batch)
                finally:
                    waits.append(mode.calls.total())
    assert waits == [0, 0, 0, 1, 0, 0, 0, 1]


def test_all_ranks_stop_where_one_has_to() -> None:
    """A rank whose own losses are well hears of the other's."""
    asked = []

    def decide(answer: bool, all: bool) -> bool:
        asked.append((answer, all))
        return True

    running = trainer(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=decide))
    callback, module = FiniteLosses(every_n_batches=1), SimpleNamespace(last_losses=losses(math.nan))
    callback.on_before_backward(running, module, torch.tensor(1.0))
    assert asked == []  # not in each step
    with pytest.raises(TrainingError, match="step 1 is not finite"):
        callback.on_train_batch_end(running, module, None, None, 0)
    assert asked == [(True, False)]
