"""Cached images are the decoded ones, shared between processes, and follow their files."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from datamodules import image_cache
from datamodules.image_cache import Decoder, DiskCache, ImageFile, MemoryCache, available_memory, check_cache
from detector.errors import InputError

SIZES = np.array([[12, 20], [31, 9], [8, 8]])  # height, width


@pytest.fixture
def files(tmp_path):
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [ImageFile(tmp_path / f"{number}.png", False) for number in range(len(SIZES))]


def _count_decodings(monkeypatch):
    calls = []
    original = image_cache.read_image
    monkeypatch.setattr(image_cache, "read_image", lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_each_image_is_decoded_once(files, tmp_path, monkeypatch, kind):
    expected = [Decoder(files)(index) for index in range(3)]
    calls = _count_decodings(monkeypatch)
    cache = MemoryCache(files, SIZES) if kind == "memory" else DiskCache(files, tmp_path / "cache")
    for _ in range(2):
        for index in (2, 0, 1):
            np.testing.assert_array_equal(cache(index), expected[index])
    assert len(calls) == 3


def test_memory_is_shared_with_workers(files):
    """What a worker decodes, the other one and this process find."""
    cache = MemoryCache(files, SIZES)
    loader = DataLoader(range(3), batch_size=None, num_workers=2, collate_fn=lambda index: int(cache(index).sum()))
    sums = list(loader)
    assert cache.done.tolist() == [1, 1, 1]
    for file in files:
        file.path.unlink()
    assert [int(cache(index).sum()) for index in range(3)] == sums
    with pytest.raises(ValueError, match="read-only"):
        cache(0)[0, 0] = 1


def test_images_that_do_not_fit_are_refused_with_both_numbers(files, monkeypatch):
    monkeypatch.setattr(image_cache, "available_memory", lambda: 2000)
    total = 3 * (12 * 20 + 31 * 9 + 8 * 8)  # 1749
    assert total > 1600
    with pytest.raises(InputError, match=r"3 decoded images need 0.0 GB, of 0.0 GB.*cache_images disk"):
        MemoryCache(files, SIZES)
    monkeypatch.setattr(image_cache, "available_memory", lambda: 4000)
    MemoryCache(files, SIZES)
    with pytest.raises(InputError, match=r"in each of 2 processes"):
        MemoryCache(files, SIZES, processes=2)


def test_memory_of_this_machine():
    free = available_memory()
    assert free is None or 1e6 < free < 1e15


def test_memory_is_not_copied_into_spawned_workers(files):
    with pytest.raises(InputError, match="cache_images disk"):
        pickle.dumps(MemoryCache(files, SIZES))


def test_disk_cache_serves_other_runs_and_follows_changes(files, tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "cache"
    DiskCache(files, folder)(0)
    calls = _count_decodings(monkeypatch)
    before = pickle.loads(pickle.dumps(DiskCache(files, folder)))(0)
    assert not calls
    Image.fromarray(255 - before).save(files[0].path)
    os.utime(files[0].path, ns=(1, 1))
    np.testing.assert_array_equal(DiskCache(files, folder)(0), 255 - before)
    assert len(calls) == 1
    entry = next(path for path in folder.rglob("*.npy") if np.array_equal(np.load(path), 255 - before))
    entry.write_bytes(entry.read_bytes()[:-5])  # a cut file is no cached image
    np.testing.assert_array_equal(DiskCache(files, folder)(0), 255 - before)
    assert len(calls) == 2 and not list(folder.rglob("*.partial"))


def test_disk_cache_tells_orientations_apart(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # "rotate by 90 degrees to show"
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    shapes = [
        DiskCache([ImageFile(tmp_path / "a.jpg", upright)], tmp_path / "cache")(0).shape for upright in (False, True)
    ]
    assert shapes == [(10, 20, 3), (20, 10, 3)]


def test_places_that_cannot_be_written_to(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--data\.image_cache_dir .*file"):
        DiskCache(files, tmp_path / "file" / "cache")
    cache = DiskCache(files, tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with pytest.raises(InputError, match=r"cannot write to .*cache"):
        cache(0)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FRCNN_CACHE_DIR", str(tmp_path))
    assert check_cache("disk", None) == tmp_path / "images"
    assert check_cache("disk", str(tmp_path / "x")) == tmp_path / "x"
    assert check_cache("memory", None) is None
    monkeypatch.setenv("FRCNN_CACHE_DIR", "none")
    with pytest.raises(InputError, match="image_cache_dir"):
        check_cache("disk", None)
    with pytest.raises(InputError, match="cache_images is 'ram'"):
        check_cache("ram", None)
