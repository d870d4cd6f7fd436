"""A GPU that is not there: PyTorch follows the shapes, types and devices of tensors "on cuda" that hold no numbers.

It refuses to mix devices as a GPU does. What a program would wait for, copy and launch is counted on the way.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detector.kernels import transfers

FOUND = 3
"""What every number of found things is, as nothing is known of it."""
_VIEWS = {"view", "_unsafe_view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select"}
_VIEWS |= {"split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "unfold", "lift_fresh", "device"}
_VIEWS |= {"empty", "empty_strided", "new_empty", "empty_like"}
_TELLS_SIZE = {"nonzero", "masked_select", "_unique2", "unique_dim"}


class Counted(TorchDispatchMode):
    """Counts of what is computed within.

    Attributes:
        launches: Operations on the GPU, without views: each launches one kernel or a few.
        waits: What the program waits for: a number (`item`), a copy to the CPU (`to_cpu`) or, in the usual way, from it
            (`from_cpu`), the size of a result (by the name of the operation; `mask`: an index by one).
        copies: Copies to the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.waits: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in given)
        result = self._unknown(name, args, kwargs, on_gpu)
        if result is None:
            result = func(*args, **kwargs)
            if name in ("_to_copy", "copy_"):
                self._count_copy(name, args, kwargs, result)
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        if name not in _VIEWS and (on_gpu or any(tensor.device.type == "cuda" for tensor in made)):
            self.launches += 1
        return result

    def _unknown(self, name: str, args: Any, kwargs: Any, on_gpu: bool) -> Any:
        """Count a wait, and return a result whose numbers or size only a GPU could tell; None: it can be told."""
        first, waits = args[0] if args else None, name
        if name == "_local_scalar_dense":
            waits = "item"
            result: Any = 0 if first.dtype == torch.int32 else FOUND if first.dtype == torch.int64 else 0.0
        elif name in _TELLS_SIZE:
            found = min(FOUND, first.numel())
            result = first.new_empty(found)
            if name == "nonzero":
                result = first.new_empty((found, first.dim()), dtype=torch.int64)
            if name == "_unique2":
                result = result, *(first.new_empty(0, dtype=torch.int64) for _ in range(2))
        elif name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            waits = "mask"
            indices = [index.flatten()[:FOUND].long() for index in args[1] if index is not None]
            result = first[tuple(indices)]
        elif name == "equal":
            waits, result = "item", True
        elif name == "nms":
            result = first.new_empty(len(first), dtype=torch.int64)
        elif name == "repeat_interleave":
            size = kwargs.get("output_size")
            on_gpu, result = on_gpu and size is None, first.new_empty(size or FOUND, dtype=torch.int64)
        else:
            return None
        self.waits[waits] += int(on_gpu)
        return result

    def _count_copy(self, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        of, to = (args[1 if name == "copy_" else 0].device.type, result.device.type)
        at_leisure = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if (of, to) == ("cpu", "cuda"):
            self.copies += 1
            self.waits["from_cpu"] += not at_leisure
        if (of, to) == ("cuda", "cpu"):
            self.waits["to_cpu"] += 1


@contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors on "cuda" be made within, without numbers."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    transfers._kept.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    transfers._kept.cache_clear()


def move(network: nn.Module) -> None:
    """Put a network's tensors on the simulated GPU, whose numbers are then gone."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_moved(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _moved(buffer)


def _moved(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return empty.to(memory_format=torch.channels_last) if empty.dim() == 4 else empty


def batch(images: int, size: tuple[int, int], *, unlike: bool = False) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images (3, H, W) of bytes, all of a size or each ten pixels wider, and two objects of each."""
    pixels = [
        torch.empty(3, size[0], size[1] + 10 * unlike * i, dtype=torch.uint8, device="cuda") for i in range(images)
    ]
    target = {
        "boxes": torch.empty(2, 4, device="cuda"),
        "labels": torch.ones(2, dtype=torch.int64, device="cuda"),
        "difficult": torch.zeros(2, dtype=torch.bool, device="cuda"),
    }
    return pixels, [dict(target) for _ in range(images)]
