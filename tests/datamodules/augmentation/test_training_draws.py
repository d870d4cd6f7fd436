"""What training draws: never twice the same, and all the same again with the same seed, whatever the workers."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.detection_datamodule import DetectionDataModule
from datamodules.detection_dataset import _Packed, collate
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import Annotation, VOCObject, write_annotation

COUNT = 12
ALWAYS = [  # a draw that changes each image each time
    {"class_path": "albumentations.HorizontalFlip", "init_args": {"p": 0.5}},
    {"class_path": "albumentations.RandomGamma", "init_args": {"gamma_limit": [50, 200], "p": 1.0}},
    {"class_path": "albumentations.GaussNoise", "init_args": {"p": 1.0}},
]
TORCHVISION = [
    {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip"},
    {"class_path": "torchvision.transforms.v2.GaussianNoise", "init_args": {"sigma": 0.3}},
]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Twelve images of noise, landscape and portrait, with two objects each."""
    folder = tmp_path_factory.mktemp("noise")
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    stems = [f"i{number:02}" for number in range(COUNT)]
    for number, stem in enumerate(stems):
        height, width = (24, 36) if number % 2 else (40, 26)
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{stem}.png")
        objects = [
            VOCObject("cat", (2.0, 3.0, 20.0, 20.0)),
            VOCObject("dog", (float(number), 4.0, number + 9.0, 15.0), number % 3 == 0),
        ]
        write_annotation(Annotation(f"{stem}.png", width, height, objects), folder / "Annotations" / f"{stem}.xml")
    for split, names in (("train", stems), ("val", stems[:2])):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def _draw(folder, monkeypatch, workers, ranks=2, epochs=2, batch_size=2, **options):
    """(epoch, rank, position) -> (image id, pixels, boxes, labels, difficult, scale)."""
    drawn = {}
    for rank in range(ranks):
        monkeypatch.setattr(DetectionDataModule, "_world", (ranks, rank))
        arguments = {"train_splits": ["train"], "val_splits": ["val"], "allow_overlap": True, "seed": 3} | options
        data = VOCDataModule(str(folder), num_workers=workers, batch_size=batch_size, **arguments)
        loader = data.train_dataloader()
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            samples = [sample for images, targets in loader for sample in zip(images, targets, strict=True)]
            for position, (image, target) in enumerate(samples):
                objects = [target[key].tolist() for key in ("boxes", "labels", "difficult")]
                content = (tuple(image.shape), image.numpy().tobytes(), *objects, target.get("scale"))
                drawn[epoch, rank, position] = (target["image_id"].item(), *content)
        # Lightning keeps the frames in which a data module is made for the garbage collector. Loaders that it frees
        # wait five seconds for each worker: queues go first, so that workers are not told to end.
        del loader
    return drawn


@pytest.mark.parametrize(
    "augmentation", ["ssd_crop", "mosaic", "mixup", "copy_paste_boxes", "multiscale", ALWAYS, TORCHVISION]
)
def test_draws_differ_and_repeat_with_the_seed(noise, monkeypatch, augmentation):
    """Two workers, two epochs, two ranks."""
    first = _draw(noise, monkeypatch, workers=2, augmentation=augmentation)
    assert sorted(item[0] for item in first.values()) == sorted([*range(COUNT)] * 2)
    pictures = [(item[2], item[-1]) for item in first.values()]
    if augmentation in ("ssd_crop", ALWAYS, TORCHVISION):
        assert len(set(pictures)) == len(pictures) == 2 * COUNT
    else:  # half of these images may be only flipped, or not at all
        assert len(set(pictures)) >= 2 * COUNT - 3
    for workers in (2, 0, 1):
        assert _draw(noise, monkeypatch, workers, augmentation=augmentation) == first
    other = _draw(noise, monkeypatch, workers=0, augmentation=augmentation, seed=4)
    shared = {(item[2], item[-1]) for item in other.values()} & set(pictures)
    assert len(shared) <= (0 if augmentation in ("ssd_crop", ALWAYS, TORCHVISION) else 6)


def test_all_draws_differ_where_each_has_something_to_draw(noise, monkeypatch):
    """The random numbers of a sample: mosaic in each image, so that a shared stream would show."""
    recipe = [
        {"class_path": f"datamodules.augmentation.mixing.{name}", "init_args": {"p": 1}} for name in ("Mosaic", "MixUp")
    ]
    drawn = _draw(noise, monkeypatch, workers=2, augmentation=recipe)
    assert len({item[2] for item in drawn.values()}) == len(drawn) == 2 * COUNT


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_cache_changes_nothing(noise, monkeypatch, tmp_path, cache):
    plain = _draw(noise, monkeypatch, workers=0, augmentation="copy_paste_boxes")
    for _ in range(2):
        options = {"cache_images": cache, "image_cache_dir": str(tmp_path)}
        assert _draw(noise, monkeypatch, workers=2, augmentation="copy_paste_boxes", **options) == plain


def test_grouped_batches_hold_one_shape_on_all_ranks(noise, monkeypatch, capsys):
    options = {"augmentation": "flip", "group_by_aspect": True, "batch_size": 3, "epochs": 3}
    drawn = _draw(noise, monkeypatch, workers=1, **options)
    assert drawn == _draw(noise, monkeypatch, workers=0, **options)
    assert sorted(item[0] for item in drawn.values()) == sorted([*range(COUNT)] * 3)
    for epoch, rank, batch in itertools.product(range(3), range(2), range(2)):
        assert len({drawn[epoch, rank, 3 * batch + place][1] for place in range(3)}) == 1
    orders = [[item[0] for key, item in drawn.items() if key[:2] == (epoch, 0)] for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 3
    printed = capsys.readouterr()
    assert printed.err.count("group_by_aspect") == 2 and not printed.out  # by one rank of two, in two calls


def test_batches_arrive_from_workers_as_they_were_sent(noise, monkeypatch):
    data = VOCDataModule(str(noise), ["train"], ["val"], allow_overlap=True, augmentation="multiscale", num_workers=0)
    samples = [data.train_dataset[0, index] for index in range(3)]
    samples[1][1]["boxes"], samples[1][1]["labels"] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    samples[1][1]["difficult"] = torch.zeros(0, dtype=torch.bool)
    images, targets = collate(samples)
    function, arguments = _Packed((images, targets)).__reduce__()
    again, targets_again = function(*arguments)
    assert type(again) is type(targets_again) is list
    for left, right in zip(images, again, strict=True):
        assert torch.equal(left, right) and right.dtype == torch.uint8 and right.is_contiguous()
    for left, right in zip(targets, targets_again, strict=True):
        assert left.keys() == right.keys() and left["scale"] == right["scale"]
        for key in ("boxes", "labels", "difficult", "image_id"):
            assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key])
