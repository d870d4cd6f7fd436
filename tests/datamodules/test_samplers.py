import math

import numpy as np
import pytest
from torch.utils.data.distributed import DistributedSampler

from datamodules.samplers import AspectSampler, EpochSampler, ShardSampler, group_by_aspect, padded_share
from detector.image_batch import ImageConfig


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


# ---- batches of similar shapes ----


def _ratios(count, seed=5):
    return np.random.default_rng(seed).choice([0.6, 0.75, 1.0, 1.33, 1.7], count) + 1e-3 * np.arange(count)


def _grouped(ratios, world_size=1, batch_size=4, epoch=0, seed=0, **options):
    ranks = [AspectSampler(ratios, batch_size, world_size, rank, seed, **options) for rank in range(world_size)]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    return [[index for _, index in sampler] for sampler in ranks], ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("count", [50, 64, 7])
def test_grouped_ranks_are_equally_long_and_see_what_ungrouped_ones_see(world_size, drop_last, count):
    orders, ranks = _grouped(_ratios(count), world_size, epoch=3, drop_last=drop_last)
    plain = [EpochSampler(range(count), world_size, rank, drop_last=drop_last) for rank in range(world_size)]
    for sampler in plain:
        sampler.set_epoch(3)
    assert sorted(index for order in orders for index in order) == sorted(i for sampler in plain for _, i in sampler)
    assert {len(order) for order in orders} == {len(ranks[0])} == {len(plain[0])}


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_of_a_batch_are_neighbours_in_their_stretch(world_size):
    """96 images, steps of 4 per rank, sorted in stretches of 3 steps, of which ranks get neighbours."""
    ratios = _ratios(96)
    orders, _ = _grouped(ratios, world_size, epoch=2, stretch=3)
    plain = EpochSampler(range(96))
    plain.set_epoch(2)
    shuffled = [index for _, index in plain]
    size = 3 * 4 * world_size
    batches, steps = set(), set()
    for start in range(0, 96, size):
        part = sorted(shuffled[start : start + size], key=lambda index: ratios[index])
        batches |= {tuple(part[first : first + 4]) for first in range(0, size, 4)}
        steps |= {tuple(part[first : first + 4 * world_size]) for first in range(0, size, 4 * world_size)}
    found = [[tuple(order[start : start + 4]) for start in range(0, len(order), 4)] for order in orders]
    assert {batch for rank in found for batch in rank} == batches and len(batches) == 24
    assert {sum(same_step, ()) for same_step in zip(*found, strict=True)} == steps


def test_grouped_order_is_drawn_from_seed_and_epoch():
    ratios = _ratios(60)
    drawn = [_grouped(ratios, epoch=epoch, seed=seed)[0][0] for seed in (0, 1) for epoch in (0, 1)]
    assert _grouped(ratios, epoch=1, seed=1)[0][0] == drawn[3]
    assert len({tuple(order) for order in drawn}) == 4
    together = [{frozenset(order[i : i + 4]) for i in range(0, 60, 4)} for order in drawn[:2]]
    assert len(together[0] & together[1]) < 5  # other images meet in the next epoch
    firsts = [ratios[_grouped(ratios, epoch=epoch)[0][0][0]] for epoch in range(20)]
    assert min(firsts) < 0.7 and max(firsts) > 1.4  # not from narrow to tall in each epoch


def test_grouped_order_resumes_exactly():
    whole = AspectSampler(_ratios(50), 4, 2, 1, seed=7)
    whole.set_epoch(4)
    resumed = AspectSampler(_ratios(50), 4, 2, 1, seed=7)
    resumed.resume(4, 12)
    resumed.set_epoch(4)
    assert list(resumed) == list(whole)[12:]
    assert isinstance(resumed, DistributedSampler)


def test_padded_share():
    sizes = np.array([[100, 200], [200, 100], [100, 200]])
    assert padded_share(sizes, [[0, 1]]) == pytest.approx(1 - 40000 / 80000)
    assert padded_share(sizes, [[0, 2], [1]]) == 0
    assert padded_share(sizes, [[0, 2]], 64) == pytest.approx(1 - 40000 / (2 * 128 * 256))
    assert padded_share(sizes, []) == 0


def test_grouping_saves_padding_and_says_how_much(capsys):
    sizes = np.array([[375, 500], [500, 375]] * 40)
    group_by_aspect(EpochSampler(range(80)), sizes, 4, ImageConfig([600], 1000, pad_multiple=1))
    words = capsys.readouterr().err.split()
    after, before = (float(words[place]) for place in (1, words.index("instead") + 2))
    assert after < 5 and before > 15  # a mixed batch is a quarter padding
