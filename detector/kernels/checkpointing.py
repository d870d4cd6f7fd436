"""Gradient checkpointing (Chen et al. 2016): of a stage only the input is kept, and the backward pass computes the rest
once more."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_stage(modules: Sequence[nn.Module], x: Tensor, checkpointed: bool) -> Tensor:
    """`modules` one after the other on `x`; without gradients, as in a frozen stage, `checkpointed` changes nothing.

    Modules are functions of their input: they draw no random numbers.
    """

    def run(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(modules)

    if not (checkpointed and needs_gradients(modules, x)):
        return run(x)
    if torch.compiler.is_compiling():  # the compiled second pass has no side effects
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    result: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


def needs_gradients(modules: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether a backward pass may come through `modules` on `x`."""
    tensors = (x, *(parameter for module in modules for parameter in module.parameters()))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@contextmanager
def _statistics_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norms count a second pass over the same batch neither in their statistics nor in their number."""
    norms = [norm for module in modules for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the statistics stay as they are, to the bit
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
