"""Results that are kept while the tensors they are of stay as they are."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.kernels import onednn
from detector.kernels.kept import Kept
from detector.kernels.onednn import Conv2d, Linear


@pytest.fixture(params=[False, True], ids=["plain", "kept"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Let layers on a CPU do as on a GPU, or not."""

    def keeps(_: Tensor, *weights: Tensor | None) -> bool:
        return not (torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights))

    if request.param:
        monkeypatch.setattr(onednn, "keeps_weights", keeps)
    yield request.param


def convolution(bias: bool = False) -> Conv2d:
    torch.manual_seed(0)
    conv, norm = Conv2d(3, 4, 3, bias=bias), FrozenBatchNorm2d(4)
    norm.running_var.copy_(torch.tensor([0.25, 1.0, 4.0, 9.0]))
    norm.running_mean.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    conv.norm, norm.folded = (norm,), True
    return conv.eval()


def expected(conv: Conv2d, x: Tensor) -> Tensor:
    """Return what PyTorch's own layers give."""
    norm = conv.norm[0]
    plain = nn.functional.batch_norm(
        nn.functional.conv2d(x, conv.weight, conv.bias), norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    return plain


def test_is_made_anew_only_after_a_change() -> None:
    made, kept, tensor = [], Kept[int](), torch.ones(2)

    def make() -> int:
        made.append(int(tensor.sum()))
        return made[-1]

    assert [kept(make, [tensor]), kept(make, [tensor])] == [2, 2]
    tensor.add_(1)
    assert [kept(make, [tensor]), kept(make, [tensor])] == [4, 4]
    assert kept(make, [tensor], "another kind") == 4
    assert made == [2, 4, 4]
    tensor = tensor.clone()  # as `module.to` replaces buffers
    assert kept(make, [tensor], "another kind") == 4
    kept.clear()
    kept(make, [tensor], "another kind")
    assert len(made) == 5


@pytest.mark.parametrize("write", ["foreach", "fused", "load"])
def test_notices_every_way_in_which_weights_are_written(write: str) -> None:
    layer, kept = nn.Linear(2, 2, bias=False), Kept[Tensor]()
    weight = layer.weight
    before = kept(weight.clone, [weight])
    with torch.no_grad():
        if write == "foreach":
            torch._foreach_lerp_([weight], [weight + 1], 0.5)
        elif write == "load":
            layer.load_state_dict({"weight": weight + 1})
    if write == "fused":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=1.0, fused=True).step()
    after = kept(weight.clone, [weight])
    assert not torch.equal(before, after)
    assert torch.equal(after, weight)


def test_copies_start_with_nothing() -> None:
    kept, tensor = Kept[int](), torch.ones(1)
    kept(lambda: 1, [tensor])
    for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert copied(lambda: 2, [tensor]) == 2


def test_a_result_kept_in_inference_mode_serves_training() -> None:
    conv = convolution()
    x = torch.randn(1, 3, 6, 6)
    with torch.inference_mode():
        conv(x)
    conv.train()(x).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("bias", [False, True])
def test_convolution_with_a_folded_norm(keeping: bool, bias: bool) -> None:
    conv, x = convolution(bias), torch.randn(2, 3, 8, 9)
    for _ in range(2):
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                torch.testing.assert_close(conv(x), expected(conv, x))
    with torch.no_grad():
        conv.weight.mul_(2)
        torch.testing.assert_close(conv(x), expected(conv, x))
        conv.norm[0].running_mean.add_(1)
        torch.testing.assert_close(conv(x), expected(conv, x))
    gradient = torch.autograd.grad(conv(x).square().sum(), conv.weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected(conv, x).square().sum(), conv.weight)[0])


def test_autocast_gives_the_same_numbers_kept_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, plain, linear = convolution(), Conv2d(4, 2, 1).eval(), Linear(5, 3).eval()
    x, vectors = torch.randn(2, 3, 8, 9), torch.randn(4, 5)

    def results() -> list[Tensor]:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            return [plain(conv(x)), linear(vectors), plain(conv(x)), linear(vectors)]

    monkeypatch.setattr(onednn, "computes_bfloat16", lambda: False)  # as on a GPU
    before = results()
    monkeypatch.setattr(onednn, "keeps_weights", lambda *_: True)
    for old, new in zip(before, results(), strict=True):
        assert old.dtype == new.dtype == torch.bfloat16
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert conv._kept._results[0][0].dtype == torch.bfloat16
    conv.train()
    assert not conv._kept._results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_scaled_and_rounded_in_one_operation(dtype: torch.dtype) -> None:
    """As they are in two, and with the same gradient."""
    conv = convolution()
    gradients = []
    for weight in (conv.folded(dtype)[0], conv.folded()[0].to(dtype)):
        assert weight.dtype == dtype
        (gradient,) = torch.autograd.grad((weight.float() ** 2).sum(), conv.weight)
        gradients.append((weight, gradient))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
