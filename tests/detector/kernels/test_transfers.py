"""What a GPU is waited for, counted on the CPU by the functions that are called."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.ops import batched_nms

from detector import post_processing, rpn
from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig, BackboneName
from detector.faster_rcnn import Difficult, FasterRCNN
from detector.image_batch import ImageConfig
from detector.kernels import transfers
from detector.kernels.transfers import constant, true_indices
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig

TELL = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "masked_select", "repeat_interleave"}
TELL |= {"equal", "allclose", "__bool__", "__int__", "__float__", "__index__"}


class Waits(TorchFunctionMode):
    """Calls by which a program waits for a GPU: those that make a number or a size of a tensor's elements, and those
    that copy the program's numbers in the usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        copies = (name in ("tensor", "as_tensor", "from_numpy") and "device" in kwargs) or name == "new_tensor"
        moves = name == "to" and any(isinstance(x, torch.device | Tensor) for x in args[1:])
        moves = moves and "non_blocking" not in kwargs  # it is given where the device allows it
        by_mask = name in ("__getitem__", "__setitem__") and any(map(_is_mask, _index(args[1])))
        of_mask = name == "where" and len(args) == 1
        if name in TELL or copies or moves or by_mask or of_mask:
            self.calls[name] += 1
        return func(*args, **kwargs)


def _index(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Counter[str]]:
    """`waits(function)`: its waits, if the CPU were a GPU; NMS counts as one, whatever torchvision does in it."""
    nms_calls = 0

    def hidden_nms(*args: Any) -> Tensor:
        nonlocal nms_calls
        nms_calls += 1
        with torch._C.DisableTorchFunction():
            return batched_nms(*args)

    for module in (rpn, post_processing):
        monkeypatch.setattr(module, "batched_nms", hidden_nms)
    monkeypatch.setattr(transfers, "_on_cpu", lambda masks: False)

    def count(function: Callable[[], object]) -> Counter[str]:
        nonlocal nms_calls
        nms_calls = 0
        with Waits() as mode:
            function()
        return mode.calls + Counter(nms=nms_calls)

    return count


@pytest.mark.parametrize(
    ("backbone", "straddling", "difficult", "of_levels"),
    [("small_c4", "drop", "ignore", 0), ("mobilenet_v2_fpn", "keep", "drop", 1)],
)
@pytest.mark.parametrize("images", [1, 3])
def test_a_gpu_is_waited_for_in_nms_and_a_few_times_per_batch(
    waits: Callable[..., Counter[str]],
    images: int,
    backbone: BackboneName,
    straddling: Literal["drop", "keep"],
    difficult: Difficult,
    of_levels: int,
) -> None:
    detector = FasterRCNN(
        3,
        BackboneConfig(backbone, weights="none", frozen_stages=0, norm="batch"),
        AnchorConfig([1.0, 2.0, 4.0], straddling=straddling),
        RPNConfig(pre_nms_train=300, pre_nms_test=300, score_threshold=0.01),
        RoIConfig(sampling_ratio=0, class_weights=[1.0, 2.0, 1.0, 1.0]),  # 0: the operator that GPUs use
        ImageConfig(shortest_side=[96]),
        difficult,
    )
    pixels = [torch.randint(0, 255, (3, 80, 100 + 10 * i), dtype=torch.uint8) for i in range(images)]
    boxes = torch.tensor([[10.0, 5.0, 60.0, 60.0], [40.0, 20.0, 90.0, 70.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "difficult": torch.tensor([False, True])}
    # Usable proposals; the anchors' and the RoIs' samples; positive RoIs; for several levels, the RoIs of each.
    assert waits(lambda: detector.losses(pixels, [target] * images)) == Counter(tolist=4 + of_levels, nms=images)
    # Usable proposals, likely boxes.
    detector.eval()
    with torch.no_grad():
        assert waits(lambda: detector(pixels)) == Counter(tolist=2 + of_levels, nms=2 * images)


def test_waits_are_noticed(waits: Callable[..., Counter[str]]) -> None:
    """The counter above counts."""
    x = torch.arange(3.0)
    waiting: dict[str, Callable[[], object]] = {
        "item": lambda: x[0].item(),
        "__bool__": lambda: bool(x[0] > 0),
        "__float__": lambda: float(x[0]),
        "__getitem__": lambda: x[x > 1],
        "where": lambda: torch.where(x > 1),
        "new_tensor": lambda: x.new_tensor([1.0]),
        "tensor": lambda: torch.tensor([1.0], device=x.device),
        "to": lambda: x.to(x.device),
    }
    for name, function in waiting.items():
        assert waits(function) == Counter({name: 1})
    assert not waits(lambda: (constant([1.0], x), x[0], x[torch.tensor([1, 2])], torch.where(x > 1, x, 0), x.long()))
    assert waits(lambda: true_indices([x > 1, x > 0])) == Counter(tolist=1)


def test_true_indices_alike_on_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    masks = [torch.rand(n) < share for n, share in ((1, 1.0), (700, 0.02), (33000, 0.5), (40, 0.0), (0, 0.0))]
    expected = [[i for i, chosen in enumerate(mask.tolist()) if chosen] for mask in masks]
    for on_cpu in (True, False):
        monkeypatch.setattr(transfers, "_on_cpu", lambda _, answer=on_cpu: answer)
        found = true_indices(masks)
        assert [indices.tolist() for indices in found] == expected
        assert {indices.dtype for indices in found} == {torch.int64}


def test_constant_is_as_new_tensor() -> None:
    for like in (torch.zeros(2), torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)):
        assert constant((3, 7), like).equal(like.new_tensor((3, 7)))
        assert constant((3, 7), like).dtype == like.dtype
