"""`frcnn benchmark data`: our training loader beside torchvision's `VOCDetection` with `transforms.v2`.

Both read the same JPEG files and annotations, with the same operations, batch size and number of worker processes, in
turn. They differ in where an image gets the size that the network sees: here in the training step, on its device, in
torchvision's reference scripts in the loader. So there are two kinds of cases: images as they leave the decoder and the
augmentation (uint8, both alike), and batches that are resized, normalised and padded, whoever does it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from datamodules.augmentation.transforms import ColorJitter
from datamodules.detection_dataset import DetectionDataset
from datamodules.image_cache import CacheKind
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import read_split
from datamodules.voc.layout import find_split, is_plain
from datamodules.voc.reader import VOCFormat
from detector.errors import InputError
from detector.image_batch import ImageConfig, make_batch
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.measuring import median_times, milliseconds, processor, this_device
from experiments.benchmark.options import LoaderOptions

PEER: Final = "torchvision VOCDetection"


@dataclass(frozen=True)
class DataCase:
    """One comparison under the augmentation of both.

    With `batch` they deliver resized, normalised and padded batches rather than images. The peer keeps nothing.
    """

    name: str
    augmentation: str
    batch: bool = False
    cache: CacheKind = "none"


CASES: Final = (
    DataCase("flip, images", "flip"),
    DataCase("photometric, images", "photometric"),
    DataCase("ssd_crop, images", "ssd_crop"),
    DataCase("flip, resized batches", "flip", batch=True),
    DataCase("flip, images, ours cached in memory", "flip", cache="memory"),
)


def benchmark_data(options: LoaderOptions) -> Benchmark:
    """Time epochs of both loaders over the first images of a split, one after the other; medians.

    The workers of both are started and the files read once before.

    Raises:
        InputError: A root that holds no VOC year with this split, or fewer images than a batch.
    """
    root, splits, batch_size = Path(options.data.root), options.data.train_splits or [], options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        images = _link_devkit(root.expanduser(), splits, Path(folder), options.images)
        if images < batch_size:
            raise InputError(f"--batch_size {batch_size}: the splits hold {images} images")
        cases = [_run(case, folder, options) for case in CASES]
    how = f"batches of {batch_size}, {options.workers} worker processes"
    title = f"loading {images} images of {splits[0]}, per image; {how}"
    packages = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless")
    return Benchmark(title, f"cpu: {processor()}; resized on {this_device()}", packages, cases=cases)


def _link_devkit(root: Path, splits: Sequence[str], folder: Path, images: int) -> int:
    """Make a devkit at `folder`/VOCdevkit/VOC2012 with the first images of a split as `train`; return how many."""
    VOCFormat(root).check_root()
    if is_plain(root) or len(splits) != 1:
        raise InputError(
            f"--data.root {root}: must hold VOC<year>/ with one split, such as [2012_train]: the peer needs it"
        )
    split = find_split(root, splits[0])
    names = read_split(split.path)[:images]
    voc = folder / "VOCdevkit" / "VOC2012"
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    for part in ("Annotations", "JPEGImages"):
        (voc / part).symlink_to((split.folder / part).resolve())
    (voc / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    return len(names)


def _run(case: DataCase, folder: str, options: LoaderOptions) -> Case:
    device, batch_size, workers = this_device(), options.batch_size, options.workers
    loader, dataset = _our_loader(case, folder, batch_size, workers)
    peer = _peer_loader(case, folder, batch_size, workers)
    epoch = count()

    def our_epoch() -> None:
        loader.sampler.set_epoch(next(epoch))  # type: ignore[attr-defined]
        for batch in loader:
            if case.batch:
                _to_batch(batch)

    def peer_epoch() -> None:
        for batch in peer:
            if case.batch:
                batch[0].to(device)

    images = len(dataset) // batch_size * batch_size
    ours_ms, peer_ms = (time / images for time in median_times([our_epoch, peer_epoch], device, options.repeats))
    return Case(case.name, ours_ms, peer_ms, _parts(dataset), PEER, number=1)


def _to_batch(batch: Any) -> Any:
    device = this_device()
    return make_batch([image.to(device) for image in batch[0]], ImageConfig(), training=True)


def _our_loader(case: DataCase, folder: str, batch_size: int, workers: int) -> tuple[DataLoader[Any], DetectionDataset]:
    data = VOCDataModule(
        folder,
        train_splits=["2012_train"],
        val_splits=["2012_train"],
        augmentation=case.augmentation,
        batch_size=batch_size,
        num_workers=workers,
        seed=0,
        allow_overlap=True,
        annotation_cache="none",
        cache_images=case.cache,
    )
    return data.train_dataloader(), data.train_dataset


def _peer_loader(case: DataCase, folder: str, batch_size: int, workers: int) -> DataLoader[Any]:
    dataset = VOCDetection(folder, year="2012", image_set="train", transforms=v2.Compose(_peer_transforms(case)))
    return DataLoader(
        wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels")),
        batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=_pad if case.batch else _lists,
        drop_last=True,
        persistent_workers=workers > 0,
    )


def _peer_transforms(case: DataCase) -> list[Any]:
    ranges = {name: tuple(values) for name, values in ColorJitter().ranges.items()}
    crop = case.augmentation == "ssd_crop"
    steps: list[Any] = [v2.ToImage(), *([v2.RandomIoUCrop()] if crop else []), v2.RandomHorizontalFlip(0.5)]
    if case.augmentation in ("photometric", "ssd_crop"):
        steps += [v2.RandomApply([v2.ColorJitter(**ranges)], p=0.8)]
    if crop:
        steps += [v2.SanitizeBoundingBoxes()]
    if case.batch:
        image = ImageConfig()
        steps += [v2.Resize(image.shortest_side, max_size=image.longest_side, antialias=False)]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(image.mean, image.std)]
    return steps


def _lists(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    return [image for image, _ in samples], [target for _, target in samples]


def _pad(samples: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    """Return a batch as torchvision's detectors make it: zeros at the right and bottom, to a multiple of 32."""
    images, targets = _lists(samples)
    height, width = (-(-max(sides) // 32) * 32 for sides in zip(*(image.shape[-2:] for image in images), strict=True))
    padded = [v2.functional.pad(image, [0, 0, width - image.shape[-1], height - image.shape[-2]]) for image in images]
    return torch.stack(padded), targets


def _parts(dataset: DetectionDataset, images: int = 60) -> dict[str, float]:
    """Return the shares of one sample's time without workers, median of each part."""
    decode, whole = [], []
    for index in range(min(images, len(dataset))):
        decode.append(milliseconds(partial(dataset.read, index)))
        whole.append(milliseconds(partial(dataset.__getitem__, (1, index))))
    share = min(1.0, median(decode) / median(whole))
    return {"read and decode": share, "augment": 1 - share}
