"""Batches: sizes and pixels as torchvision's detectors have them, normalisation, padding, and boxes there and back."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detector.errors import InputError
from detector.image_batch import ImageBatch, ImageConfig, ground_truth, make_batch, rescale, resized_size, to_original

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "pixel_max": 255.0}


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (600, 800)),  # the shorter side decides
        ((500, 375), (800, 600)),
        ((281, 500), (562, 1000)),  # the longer side decides
        ((500, 282), (1000, 564)),
        ((101, 1000), (101, 1000)),
        ((7, 3000), (2, 1000)),  # 2.33 rounded down
        ((1, 5000), (1, 1000)),  # never 0
    ],
)
def test_sizes_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 600, 1000) == expected


def test_pixels_and_sizes_are_torchvisions() -> None:
    # 104 * (60 / 104) is below 60 in floating point: the side becomes 59 there and here.
    sizes = [(37, 53), (53, 37), (333, 500), (61, 200), (199, 35), (60, 100), (123, 77), (104, 110)]
    images = [image(*size, seed=i) for i, size in enumerate(sizes)]
    config = ImageConfig(shortest_side=[60], longest_side=100, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    batch = make_batch(images, config, training=False)
    transform = GeneralizedRCNNTransform(60, 100, config.mean, config.std, size_divisible=32).eval()
    peer, _ = transform([i / 255 for i in images])
    assert batch.sizes == [tuple(size) for size in peer.image_sizes]
    assert batch.sizes[-1] == (59, 63)
    assert batch.original_sizes == sizes
    assert batch.tensors.shape == (8, 3, 128, 128)  # 100 rounded up to a multiple of 32
    torch.testing.assert_close(batch.tensors, peer.tensors, atol=1e-5, rtol=0)
    boxes = torch.tensor([[3.0, 5.0, 20.0, 31.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "difficult": torch.tensor([False])}
    _, peer_targets = transform([i / 255 for i in images], [{"boxes": boxes} for _ in images])
    for truth, peer_target in zip(ground_truth([target] * len(images), batch), peer_targets, strict=True):
        torch.testing.assert_close(truth.boxes, peer_target["boxes"])


def test_padding_is_zero_at_the_bottom_and_right_of_a_multiple() -> None:
    config = ImageConfig(shortest_side=[20], longest_side=50, pad_multiple=24, **PLAIN)
    batch = make_batch([image(20, 31) // 2 + 1, image(49, 22) // 2 + 1], config, training=False)
    assert batch.sizes == [(20, 31), (44, 20)]  # 49 x 22 shrunk by 20 / 22
    assert batch.tensors.shape == (2, 3, 48, 48)
    for tensor, (height, width) in zip(batch.tensors, batch.sizes, strict=True):
        assert (tensor[:, :height, :width] > 0).all()
        assert (tensor[:, height:] == 0).all()
        assert (tensor[:, :, width:] == 0).all()


def test_channel_order_mean_and_range_by_hand() -> None:
    pixel = torch.tensor([10, 20, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)
    caffe = ImageConfig([16], 16, mean=[1.0, 2.0, 3.0], std=[1.0, 2.0, 4.0], channel_order="bgr", pixel_max=255.0)
    batch = make_batch([pixel], caffe, training=False).tensors
    # Blue first: (40 - 1) / 1, (20 - 2) / 2, (10 - 3) / 4; mean and std are in the order of the channels.
    assert batch[0, :, 5, 7].tolist() == [39.0, 9.0, 1.75]
    unit = ImageConfig([16], 16, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.2])
    expected = torch.tensor([(10 / 255 - 0.1) / 0.5, (20 / 255 - 0.2) / 0.25, (40 / 255 - 0.3) / 0.2])
    torch.testing.assert_close(make_batch([pixel], unit, training=False).tensors[0, :, 0, 0], expected)


def test_float_images_are_in_0_to_255_too_and_stay_unchanged() -> None:
    integers = image(18, 30)
    floats = integers.float()
    config = ImageConfig([24], 40)
    batches = [make_batch([i], config, training=False).tensors for i in (integers, floats)]
    torch.testing.assert_close(*batches)
    assert (floats == integers).all()


def test_batches_are_channels_last_in_memory() -> None:
    for images in ([image(20, 30)], [image(20, 30), image(30, 20)]):
        tensors = make_batch(images, ImageConfig([20], 40), training=False).tensors
        assert tensors.is_contiguous(memory_format=torch.channels_last)
        assert tensors.dtype == torch.float32


def test_training_draws_one_of_several_sides_evaluation_takes_the_last() -> None:
    config = ImageConfig(shortest_side=[20, 28, 36], longest_side=80)
    torch.manual_seed(0)
    drawn = [make_batch([image(20, 30), image(20, 30)], config, training=True).sizes for _ in range(30)]
    assert {size for sizes in drawn for size in sizes} == {(20, 30), (28, 42), (36, 54)}
    assert any(first != second for first, second in drawn)  # one for each image
    assert {tuple(make_batch([image(20, 30)], config, training=False).sizes) for _ in range(5)} == {((36, 54),)}


def test_boxes_follow_each_axis_and_come_back() -> None:
    # Rounding down makes the two scales differ: 61 x 200 -> 30 x 100.
    batch = make_batch([image(61, 200)], ImageConfig([60], 100), training=False)
    assert batch.sizes == [(30, 100)]
    box = torch.tensor([[20.0, 6.1, 150.0, 61.0]])
    truth = ground_truth([{"boxes": box, "labels": torch.tensor([3]), "difficult": torch.tensor([1])}], batch)[0]
    torch.testing.assert_close(truth.boxes, torch.tensor([[10.0, 3.0, 75.0, 30.0]]))
    assert truth.labels.tolist() == [3]
    assert truth.difficult.tolist() == [True]
    torch.testing.assert_close(to_original(truth.boxes, batch, 0), box)


def test_boxes_back_in_the_original_are_clipped_to_it() -> None:
    batch = ImageBatch(torch.zeros(2, 3, 32, 32), [(32, 32), (20, 10)], [(32, 32), (60, 20)])
    boxes = torch.tensor([[-1.0, 2.0, 10.5, 21.0], [2.0, 4.0, 5.0, 9.0]])
    assert to_original(boxes, batch, 1).tolist() == [[0, 6, 20, 60], [4, 12, 10, 27]]
    assert rescale(boxes, (20, 10), (60, 20))[0].tolist() == [-2, 6, 21, 63]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest_side": []}, r"image\.shortest_side: \[\]"),
        ({"shortest_side": [600, 8]}, r"image\.shortest_side: \[600, 8\]"),
        ({"shortest_side": [480, 800], "longest_side": 700}, r"700 is below the largest shortest_side 800"),
        ({"mean": [0.5]}, r"got 1 and 3 numbers"),
        ({"std": [0.2, 0.0, 0.2]}, r"image\.std: \[0\.2, 0\.0, 0\.2\] must be positive"),
        ({"channel_order": "gbr"}, r"image\.channel_order: 'gbr' is none of rgb, bgr"),
        ({"test_shortest_sides": [480, 8]}, r"image\.test_shortest_sides: \[480, 8\]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageConfig(**options)


def test_scales_multiply_the_shortest_side_of_each_image():
    """20 x 30 at a shortest side of 40: 0.75 gives 30 x 45; the longest side of 60 holds back what 1.25 asks for."""
    config = ImageConfig([40], 60, pad_multiple=1)
    images = [image(20, 30)] * 3
    assert make_batch(images, config, training=True, scales=[0.75, 1, 1.25]).sizes == [(30, 45), (40, 60), (40, 60)]
    assert make_batch(images, config, training=True).sizes == [(40, 60)] * 3
