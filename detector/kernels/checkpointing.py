"""How a stage of a backbone is run: layer by layer, with gradient checkpointing, or in strips of rows.

With checkpointing (Chen et al. 2016) only the input of a stage is kept, and the backward pass computes the rest again.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from detector.kernels.strips import pooled_in_strips, worth_strips


def run_stage(modules: Sequence[nn.Module], x: Tensor, checkpointed: bool) -> Tensor:
    """Return `modules` of `x`, one after the other; without gradients, as in a frozen stage, they are not checkpointed.

    Modules are functions of their input: they draw no random numbers.
    """
    tensors = (x, *(parameter for module in modules for parameter in module.parameters()))
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return pooled_in_strips(modules, x) if worth_strips(modules, x) else _run(modules, x)
    if not checkpointed:
        return _run(modules, x)

    def run(x: Tensor) -> Tensor:
        return _run(modules, x)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(modules)

    if torch.compiler.is_compiling():  # the compiled second pass has no side effects
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    result: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


def _run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


@contextmanager
def _statistics_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let batch norms count a second pass over the same batch neither in their statistics nor in their number."""
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
