"""Which rank sees which image when.

All samplers derive from `DistributedSampler`, also on one process, because Lightning replaces any other sampler under
DDP by one that repeats images; they are given rank and world size and never ask torch.distributed.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from detector.errors import InputError
from detector.image_batch import ImageConfig, resized_size


class EpochSampler(DistributedSampler):  # type: ignore[type-arg]
    """Shuffled training order that yields (epoch, index), so that a dataset can derive its randomness from both.

    The order is a function of (seed, epoch) alone; without `shuffle` it is that of the images. Each rank gets equally
    many samples: with `drop_last` the tail of the shuffled order is left out, otherwise its start is repeated.
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
        super().__init__(cast(Dataset[Any], dataset), num_replicas, rank, shuffle, seed, drop_last)
        self._skip = 0

    def resume(self, epoch: int, samples: int) -> None:
        """Start in the middle: go to `epoch` and leave out this rank's first `samples` samples of it.

        The length stays that of a full epoch (Lightning counts the batches already done itself). The next `set_epoch`
        to another epoch ends the skipping.
        """
        self.epoch = epoch
        self._skip = samples

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Lightning calls this before every one."""
        if epoch != self.epoch:
            self._skip = 0
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, skip = self.epoch, self._skip
        mine = self._order(epoch)[self.rank : self.total_size : self.num_replicas]
        return iter([(epoch, index) for index in mine[skip:]])

    def _order(self, epoch: int) -> list[int]:
        """Return the images of all ranks: rank r takes positions r, r + num_replicas, ..."""
        count = len(cast(Sized, self.dataset))
        order = list(range(count))
        if self.shuffle:
            # Hashed, not added: seed 0 in epoch 1 and seed 1 in epoch 0 must not share an order.
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(count).tolist()
        if count < self.total_size:
            order = (order * -(-self.total_size // count))[: self.total_size] if count else []
        return order


class AspectSampler(EpochSampler):
    """An `EpochSampler` whose batches, and whose steps on all ranks, hold images of similar shapes.

    The shuffled order is cut into stretches of `stretch` steps; the images of each are sorted by aspect ratio, cut into
    batches, and the batches of the whole epoch are shuffled. So which images meet still changes from epoch to epoch.
    All is a function of (seed, epoch) alone, and each epoch holds the same images as with `EpochSampler`.

    Args:
        aspect_ratios: (N,) height / width of each image.
        batch_size: images per rank and step.
        num_replicas, rank, seed, drop_last: those of `EpochSampler`.
        stretch: steps whose images are sorted together, at most a quarter of an epoch's; more save more padding, fewer
            let more images meet.
    """

    def __init__(
        self,
        aspect_ratios: NDArray[np.float64],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = True,
        stretch: int = 16,
    ) -> None:
        super().__init__(aspect_ratios, num_replicas, rank, seed, drop_last)
        self.aspect_ratios, self.batch_size, self.stretch = aspect_ratios, batch_size, stretch

    def _order(self, epoch: int) -> list[int]:
        order = super()._order(epoch)[: self.total_size]
        step = self.batch_size * self.num_replicas
        whole = len(order) // step * step  # what remains makes the last, smaller batch
        size = step * max(1, min(self.stretch, whole // step // 4))
        steps: list[list[int]] = []
        for start in range(0, whole, size):
            part = order[start : min(start + size, whole)]
            part.sort(key=self.aspect_ratios.__getitem__)  # stable: equal ratios stay shuffled
            steps += [part[first : first + step] for first in range(0, len(part), step)]
        arranged: list[int] = []
        seed = np.random.SeedSequence([self.seed, epoch], spawn_key=(1,))
        for position in np.random.default_rng(seed).permutation(len(steps)):
            # Position i belongs to rank i mod num_replicas, and each rank gets neighbours.
            arranged += np.reshape(steps[position], (self.num_replicas, self.batch_size)).T.ravel().tolist()
        return arranged + order[whole:]


def padded_share(sizes: NDArray[np.int64], batches: Iterable[Sequence[int]], multiple: int = 1) -> float:
    """Return the share of padding in all pixels, when each batch is padded to its largest height and width.

    Sizes (N, 2) are height and width as the network sees them, batches the indices of their images; they are padded to
    a multiple of so many pixels.
    """
    used = padded = 0
    for batch in batches:
        members = sizes[list(batch)]
        height, width = (-(-int(side) // multiple) * multiple for side in members.max(0))
        used += int(members.prod(1).sum())
        padded += height * width * len(members)
    return 1 - used / padded if padded else 0.0


def group_by_aspect(
    plain: EpochSampler, sizes: NDArray[np.int64], batch_size: int, image: ImageConfig
) -> AspectSampler:
    """Make the sampler that groups what `plain` shuffles; the first rank says on stderr how much padding that saves.

    Sizes (N, 2) are height and width of the image files; of several shortest sides the last one counts for what is
    said.
    """
    ratios = sizes[:, 0] / sizes[:, 1]
    grouped = AspectSampler(ratios, batch_size, plain.num_replicas, plain.rank, plain.seed, plain.drop_last)
    if plain.rank:
        return grouped
    seen = np.array([resized_size((h, w), image.shortest_side[-1], image.longest_side) for h, w in sizes.tolist()])
    shares = []
    for sampler in (plain, grouped):
        order = [index for _, index in sampler]
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        shares.append(padded_share(seen, batches, image.pad_multiple))
    print(
        f"group_by_aspect: {100 * shares[1]:.1f} % of the pixels of training batches are padding, instead of "
        f"{100 * shares[0]:.1f} % (first epoch, shortest side {image.shortest_side[-1]})",
        file=sys.stderr,
    )
    return grouped


class ShardSampler(DistributedSampler):  # type: ignore[type-arg]
    """Evaluation order: every image on some rank, and equally many on each rank.

    The first images are repeated to fill up, and the metrics count them once. Equal numbers, because DDP exchanges the
    buffers of batch norm in every forward pass of a training's validation: a rank with one batch more would hang.
    Yields plain indices.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(cast(Dataset[Any], dataset), num_replicas=num_replicas, rank=rank, shuffle=False)
        self.num_samples = -(-len(dataset) // num_replicas)
        self._indices = [i % len(dataset) for i in range(rank, self.num_samples * num_replicas, num_replicas)]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def done_so_far(trainer: pl.Trainer) -> dict[str, int]:
    """Return where training goes on: `epoch` and the number of its `batches` already done on each rank."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    # Not `completed`: Lightning raises that only after the hook in which checkpoints are written.
    batches: int = loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    epoch: int = epochs.processed
    if epochs.started == epochs.processed:  # between two epochs
        batches = 0
    elif batches >= trainer.num_training_batches:  # all batches done, the epoch's end hooks not yet
        epoch, batches = epoch + 1, 0
    return {"epoch": epoch, "batches": batches}


def go_on(sampler: EpochSampler, state: Mapping[str, int], terms: Mapping[str, int]) -> None:
    """Let the sampler start behind the batches that are done, from `done_so_far` with the terms of that time.

    Terms are what the number of batches hangs on, `batch_size`, `world_size` and the like, as they are now.

    Raises:
        InputError: a term has changed, and the state is of the middle of an epoch.
    """
    if state["batches"]:
        changed = [f"{key} {state.get(key, 0)}, now {now}" for key, now in terms.items() if state.get(key, 0) != now]
        if changed:
            raise InputError(
                f"the checkpoint was written in the middle of epoch {state['epoch']} with {'; '.join(changed)}: "
                "resume with the same values, or from a checkpoint of an epoch's end"
            )
    sampler.resume(state["epoch"], state["batches"] * state["batch_size"])
