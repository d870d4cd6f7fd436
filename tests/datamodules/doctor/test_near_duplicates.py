"""Which pictures are compared by their pixels at all: by the bits of their hashes and by their aspect ratios."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from datamodules.doctor.near_duplicates import copies, fingerprint
from datamodules.image_cache import ImageFile


@pytest.fixture
def groups(tmp_path):
    """`groups(key, values)`: which of some equal pictures are copies, if this is their fingerprints' `key`."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def of(key, values):
        files = [ImageFile(tmp_path / "a.png", False)] * len(values)
        return copies(files, [replace(fingerprint(pixels), **{key: value}) for value in values])

    return of


def test_hashes_of_copies_differ_in_at_most_four_bits(groups):
    # The second differs from the first in four bits, the third in five, and from the second in nine.
    assert groups("bits", [0, 0b1111, 0b1_1111_0000]) == [[0, 1]]


def test_aspect_ratios_of_copies_differ_by_less_than_three_per_cent(groups):
    assert groups("aspect_ratio", [1.0, 0.98]) == groups("aspect_ratio", [0.98, 1.0]) == [[0, 1]]
    assert groups("aspect_ratio", [1.0, 0.96]) == groups("aspect_ratio", [0.96, 1.0]) == []
