"""What passes between the program and the device that computes, with as few waits, copies and calls as possible.

A GPU works behind the program, which must wait for it to learn a number, or to copy one there in the usual way. Small
operations cost it less than the program takes to ask for them, so they are asked for once for all images of a batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

_CPUS = frozenset({"cpu"})


def one_by_one(tensor: Tensor) -> bool:
    """Return whether images are better computed one by one on a tensor's device: on CPUs, whose caches hold few.

    Elsewhere what is asked for at once for many images is computed at once.
    """
    return tensor.device.type in _CPUS


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor (n,) of the type of `like`, on its device: do not write into it.

    Its `new_tensor` does the same, but a GPU would be waited for. GPUs keep the last ones.
    """
    if one_by_one(like):
        return torch.tensor(values, dtype=like.dtype)
    return _kept(tuple(values), like.dtype, like.device)


@lru_cache(maxsize=1024)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may serve a training later
        return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for what a GPU still computes.

    Its memory may be freed at once: CUDA has read it before it returns. Others give no such promise, and are waited
    for.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def repeated(values: Sequence[float], times: Sequence[int], like: Tensor) -> Tensor:
    """Return each of the numbers so many times, one after another, of the type of `like` and on its device."""
    each = torch.tensor(values, dtype=like.dtype)
    return send(each.repeat_interleave(torch.tensor(times), output_size=sum(times)), like.device)


def joined(indices: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """Return indices (n,) into several tensors as indices into these tensors one after another.

    `starts` are the places of their first rows there.
    """
    every = together(indices)
    if not any(starts):
        return every
    return every + repeated(starts, [len(own) for own in indices], every.new_empty(0, dtype=torch.int32))


def together(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return tensors one after another along a dimension; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def starts_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return the places of the tensors' first rows in all of them one after another."""
    return list(accumulate((len(tensor) for tensor in tensors[:-1]), initial=0))


def rows_of_images(values: Sequence[Sequence[float]], counts: Sequence[int], like: Tensor) -> Tensor:
    """Return numbers (R, n) for the rows of all images one after another, of which image i has counts[i].

    `values` are those of each image. It is (1, n) where they are the same of all images.
    """
    if len(set(map(tuple, values))) == 1:
        return constant(values[0], like)[None]
    of_image = constant([number for own in values for number in own], like).unflatten(0, (len(values), -1))
    rows: Tensor = of_image[part_of_rows(counts, like.device)]
    return rows


def part_of_rows(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the part (R,) that each row is of where part i, one after another, has counts[i] rows."""
    if len(counts) == 1:
        return torch.zeros(counts[0], dtype=torch.int64, device=device)
    return torch.repeat_interleave(send(torch.tensor(counts), device), output_size=sum(counts))


def true_indices(masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the ascending indices of the true elements of each mask (n,), asking for their numbers once for all masks.

    The masks, whose lengths may differ, are on one device.
    """
    if all(map(one_by_one, masks)):
        return [torch.where(mask)[0] for mask in masks]
    starts, every = starts_of(masks), together(masks)
    found = torch.cat((every.new_zeros(1, dtype=torch.int64), every.cumsum(0)))  # true ones before each place
    ends = constant([*starts[1:], len(every)], found)
    before = [0, *found[ends].cpu().tolist()]
    counts = [end - start for start, end in pairwise(before)]
    places = torch.searchsorted(found[1:], torch.arange(1, before[-1] + 1, device=found.device))
    if any(starts):
        places = places - repeated(starts, counts, places.new_empty(0, dtype=torch.int32))
    return list(places.split(counts))
