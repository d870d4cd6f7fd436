"""Which rank sees which image when.

Both samplers derive from `DistributedSampler`, also on one process, because Lightning replaces any other sampler under
DDP by one that repeats images; they are given rank and world size and never ask torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import cast

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


class EpochSampler(DistributedSampler):  # type: ignore[type-arg]
    """Shuffled training order that yields (epoch, index), so that a dataset can derive its randomness from both.

    The order is a function of (seed, epoch) alone. Each rank gets equally many samples: with `drop_last` the tail of
    the shuffled order is left out, otherwise its start is repeated.

    Args:
        dataset: anything with a length.
        num_replicas: number of ranks.
        rank: this rank.
        seed: seed of the shuffling, equal on all ranks.
        drop_last: leave the tail out instead of repeating images.
        shuffle: False yields the images in their order.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = True,
        shuffle: bool = True,
    ) -> None:
        super().__init__(
            cast(Dataset, dataset),
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self._skip = 0

    def resume(self, epoch: int, samples: int) -> None:
        """Start in the middle: go to `epoch` and leave out this rank's first `samples` samples of it.

        The length stays that of a full epoch (Lightning counts the batches already done itself). The next `set_epoch`
        to another epoch ends the skipping.
        """
        self.epoch = epoch
        self._skip = samples

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        if epoch != self.epoch:
            self._skip = 0
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        epoch, skip = self.epoch, self._skip
        count = len(cast(Sized, self.dataset))
        order = list(range(count))
        if self.shuffle:
            # Hashed, not added: seed 0 in epoch 1 and seed 1 in epoch 0 must not share an order.
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(count).tolist()
        if count < self.total_size:
            order = (order * -(-self.total_size // count))[: self.total_size] if count else []
        mine = order[self.rank : self.total_size : self.num_replicas]
        return iter([(epoch, index) for index in mine[skip:]])


class ShardSampler(DistributedSampler):  # type: ignore[type-arg]
    """Evaluation order: every image on some rank, and equally many on each rank.

    The first images are repeated to fill up, and the metrics count them once. Equal numbers, because DDP exchanges the
    buffers of batch norm in every forward pass of a training's validation: a rank with one batch more would hang.
    Yields plain indices.

    Args:
        dataset: anything with a length.
        num_replicas: number of ranks.
        rank: this rank.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(cast(Dataset, dataset), num_replicas=num_replicas, rank=rank, shuffle=False)
        self.num_samples = -(-len(dataset) // num_replicas)
        self._indices = [i % len(dataset) for i in range(rank, self.num_samples * num_replicas, num_replicas)]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
