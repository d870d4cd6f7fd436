"""Which pictures are compared by their pixels at all: those whose hashes differ in at most four bits of 64."""

from dataclasses import replace

import numpy as np
from PIL import Image

from datamodules.doctor.near_duplicates import copies, fingerprint
from datamodules.image_cache import ImageFile


def test_equal_pictures_are_copies_up_to_four_bits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    files = [ImageFile(tmp_path / "a.png", False)] * 3
    # The second differs from the first in four bits, the third in five, and from the second in nine.
    prints = [replace(fingerprint(pixels), bits=bits) for bits in (0, 0b1111, 0b1_1111_0000)]
    assert copies(files, prints) == [[0, 1]]
