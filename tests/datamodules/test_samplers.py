import math

import pytest
from torch.utils.data.distributed import DistributedSampler

from datamodules.samplers import EpochSampler, ShardSampler


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 10])
def test_shards_hold_each_image_and_are_equally_long(world_size, count):
    shards = [ShardSampler(range(count), world_size, rank) for rank in range(world_size)]
    drawn = [index for shard in shards for index in shard]
    assert set(drawn) == set(range(count))
    assert len(drawn) - count < world_size
    assert {len(shard) for shard in shards} == {len(list(shard)) for shard in shards} == {math.ceil(count / world_size)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_training_ranks_share_an_epoch_without_repeats(world_size):
    ranks = [EpochSampler(range(11), world_size, rank, seed=3) for rank in range(world_size)]
    for sampler in ranks:
        sampler.set_epoch(5)
    seen = [pair for sampler in ranks for pair in sampler]
    assert {epoch for epoch, _ in seen} == {5}
    assert len({index for _, index in seen}) == len(seen) == 11 // world_size * world_size
    assert {len(list(sampler)) for sampler in ranks} == {len(ranks[0])}


def test_without_drop_last_images_are_repeated_to_equal_ranks():
    ranks = [list(EpochSampler(range(3), 4, rank, drop_last=False)) for rank in range(4)]
    assert [len(rank) for rank in ranks] == [1, 1, 1, 1]
    assert {index for rank in ranks for _, index in rank} == {0, 1, 2}


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpochSampler(range(40), seed=seed)
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(40))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9


def test_resume_leaves_out_what_was_seen_and_only_in_that_epoch():
    whole = EpochSampler(range(10), 2, 1, seed=7)
    whole.set_epoch(4)
    fourth = list(whole)
    whole.set_epoch(5)
    fifth = list(whole)
    resumed = EpochSampler(range(10), 2, 1, seed=7)
    resumed.resume(4, 3)
    resumed.set_epoch(4)  # Lightning does this before the epoch that it resumes
    assert list(resumed) == fourth[3:]
    assert len(resumed) == 5
    resumed.set_epoch(5)
    assert list(resumed) == fifth


def test_lightning_leaves_both_samplers_alone():
    """Lightning replaces every sampler under DDP that is not a DistributedSampler."""
    assert isinstance(EpochSampler(range(2)), DistributedSampler)
    assert isinstance(ShardSampler(range(2)), DistributedSampler)
