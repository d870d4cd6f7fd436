import random
from pathlib import Path

import pytest

from datamodules.dataset_format import Member
from datamodules.splits import divide, find_leaks, read_lists, write_lists
from detector.errors import InputError

NAMES = [f"img {number}" for number in range(50)]


def test_a_fifth_of_the_names_and_every_name_once():
    train, val = divide(NAMES, 0.2, 0)
    assert (len(train), len(val)) == (40, 10)
    assert sorted(train + val) == sorted(NAMES)
    assert train == sorted(train) and val == sorted(val)
    assert val != sorted(NAMES)[:10] and val != sorted(NAMES)[-10:]


def test_seed_and_names_decide_and_nothing_else():
    shuffled = random.Random(3).sample(NAMES, len(NAMES))
    assert divide(NAMES, 0.2, 0) == divide(shuffled, 0.2, 0)
    drawn = [tuple(divide(NAMES, 0.2, seed)[1]) for seed in range(5)]
    assert len(set(drawn)) == 5
    # Written down, because a later version must not divide a dataset otherwise.
    assert divide(["a", "b", "c", "d", "e"], 0.4, 7) == EXPECTED


EXPECTED = (["a", "d", "e"], ["b", "c"])


def test_another_image_moves_few_of_the_others():
    before, after = set(divide(NAMES, 0.2, 0)[1]), set(divide([*NAMES, "one more"], 0.2, 0)[1])
    assert len(before - after) <= 1


@pytest.mark.parametrize(("count", "fraction", "val"), [(2, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2), (7, 0.9, 6)])
def test_neither_part_is_ever_empty(count, fraction, val):
    assert [len(names) for names in divide(NAMES[:count], fraction, 0)] == [count - val, val]


def test_one_image_cannot_be_divided():
    with pytest.raises(InputError, match=r"--data\.val_fraction 0\.2 needs at least 2 images"):
        divide(["a"], 0.2, 0)


def test_lists_are_read_back_only_for_what_they_were_made_by(tmp_path: Path):
    made_by = {"val_fraction": 0.2, "split_seed": 0}
    lists = {"train": ["a b", "VOC2007/c"], "val": ["dé"]}
    assert read_lists(tmp_path / "splits", made_by) is None
    write_lists(tmp_path / "splits", lists, made_by)
    assert read_lists(tmp_path / "splits", made_by) == lists
    assert sorted(path.name for path in (tmp_path / "splits").iterdir()) == ["made_by.json", "train.txt", "val.txt"]
    with pytest.raises(InputError, match=r"val_fraction 0\.2, now 0\.3: use the same values"):
        read_lists(tmp_path / "splits", made_by | {"val_fraction": 0.3})
    (tmp_path / "splits" / "val.txt").unlink()
    with pytest.raises(InputError, match=r"cannot be read .*val\.txt"):
        read_lists(tmp_path / "splits", made_by)


def test_overlap_is_of_images_not_of_names(tmp_path: Path):
    ours, theirs = tmp_path / "a", tmp_path / "b"
    for folder in (ours, theirs):
        folder.mkdir()
    (tmp_path / "link").symlink_to(ours)
    train = [Member("1", ours, "1", ours), Member("2", ours, "2", ours)]
    assert find_leaks({"train": train, "val": [Member("1", theirs, "1", theirs)]}).problems == {}
    leaks = find_leaks({"train": train, "val": [Member("2", tmp_path / "link", "2", ours)]})
    assert "train_splits and --data.val_splits share 1 images (2)" in leaks.summary
    assert list(leaks.problems["train"]) == train[1:]


def test_images_that_show_the_same_are_in_one_list():
    groups = [["img 1", "img 20", "img 33"], ["img 4", "img 5"]]
    for seed in range(20):
        train, val = divide(NAMES, 0.2, seed, groups)
        assert (len(train), len(val)) == (40, 10) and sorted(train + val) == sorted(NAMES)
        for group in groups:
            assert len({name in val for name in group}) == 1
    assert divide(NAMES, 0.2, 3, groups) == divide(NAMES[::-1], 0.2, 3, [group[::-1] for group in groups[::-1]])
    assert divide(NAMES, 0.2, 0, []) == divide(NAMES, 0.2, 0)
    in_val = {"img 1" in divide(NAMES, 0.5, seed, groups)[1] for seed in range(20)}
    assert in_val == {True, False}


def test_groups_that_are_too_large_to_validate_on_train():
    whole, rest = NAMES[:40], NAMES[40:]
    assert divide(NAMES, 0.2, 1, [whole]) == (sorted(whole), sorted(rest))
    # Two groups, both larger than a tenth: the smaller one validates.
    assert divide(NAMES, 0.1, 1, [whole, rest]) == (sorted(whole), sorted(rest))
    assert divide(NAMES, 0.2, 1, [NAMES]) == divide(NAMES, 0.2, 1)  # all show the same
