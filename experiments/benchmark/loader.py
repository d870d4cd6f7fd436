"""`frcnn benchmark data`: our training loader beside torchvision's `VOCDetection` with `transforms.v2`.

Both read the same JPEG files and annotations, with the same operations, batch size and number of worker processes, in
turn. They differ in where an image gets the size that the network sees: here in the training step, on its device, in
torchvision's reference scripts in the loader. So there are two kinds of cases: images as they leave the decoder and the
augmentation (uint8, both alike), and batches that are resized, normalised and padded, whoever does it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
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
from datamodules.voc.layout import check_root, find_split, is_plain
from detector.errors import InputError
from detector.image_batch import ImageConfig, make_batch
from experiments.benchmark.cases import Benchmark, Case, processor

PEER: Final = "torchvision VOCDetection"


@dataclass(frozen=True)
class DataCase:
    """One comparison.

    Args:
        name: what is compared.
        augmentation: of both.
        batch: deliver resized, normalised and padded batches rather than images.
        cache: what our loader keeps; the peer keeps nothing.
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


def benchmark_data(
    root: str, train_splits: list[str], images: int = 500, batch_size: int = 4, workers: int = 2, repeats: int = 5
) -> Benchmark:
    """Time epochs of both loaders over the first `images` images of a split, one after the other; medians.

    The workers of both are started and the files read once before.

    Raises:
        InputError: A number out of range, or a root that holds no VOC year with this split.
    """
    for name, value, least in (
        ("images", images, 1),
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    with tempfile.TemporaryDirectory() as folder:
        count = _link_devkit(Path(root).expanduser(), train_splits, Path(folder), images)
        if count < batch_size:
            raise InputError(f"--batch_size {batch_size}: the splits hold {count} images")
        cases = [_run(case, folder, batch_size, workers, repeats) for case in CASES]
    return Benchmark(
        f"loading {count} images of {train_splits[0]}, per image; batches of {batch_size}, {workers} worker processes",
        f"cpu: {processor()}; resized on {_device()}",
        cases,
        ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless"),
    )


def _link_devkit(root: Path, splits: Sequence[str], folder: Path, images: int) -> int:
    """A devkit at `folder`/VOCdevkit/VOC2012 with the first images of a split as `train`; returns how many."""
    check_root(root)
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


def _run(case: DataCase, folder: str, batch_size: int, workers: int, repeats: int) -> Case:
    ours, dataset = _our_loader(case, folder, batch_size, workers)
    peer = _peer_loader(case, folder, batch_size, workers)
    device = _device()
    finish: Callable[[Any], object] = _to_batch if case.batch else _nothing
    deliver: Callable[[Any], object] = (lambda batch: batch[0].to(device)) if case.batch else _nothing
    for epochs, step in ((ours, finish), (peer, deliver)):
        _time_epoch(epochs, step)  # starts the workers, reads the files, fills the cache
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        times["ours"].append(_time_epoch(ours, finish))
        times["peer"].append(_time_epoch(peer, deliver))
    return Case(
        case.name,
        median(times["ours"]),
        median(times["peer"]),
        _parts(dataset),
        PEER,
        ours_per_s=1000 / median(times["ours"]),
        peer_per_s=1000 / median(times["peer"]),
    )


def _nothing(batch: Any) -> None:
    pass


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _to_batch(batch: Any) -> object:
    device = _device()
    return make_batch([image.to(device) for image in batch[0]], ImageConfig(), training=True)


def _time_epoch(epochs: Iterable[Any], step: Callable[[Any], object]) -> float:
    """Milliseconds per image of one epoch."""
    start, images = perf_counter(), 0
    for batch in epochs:
        step(batch)
        images += len(batch[1])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (perf_counter() - start) / images


class _Epochs:
    """Our loader, in the next epoch each time it is iterated over, as under Lightning."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.epoch = loader, 0

    def __iter__(self) -> Iterator[Any]:
        self.loader.sampler.set_epoch(self.epoch)  # type: ignore[attr-defined]
        self.epoch += 1
        return iter(self.loader)


def _our_loader(case: DataCase, folder: str, batch_size: int, workers: int) -> tuple[_Epochs, DetectionDataset]:
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
    return _Epochs(data.train_dataloader()), data.train_dataset


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
    steps: list[Any] = [v2.ToImage()]
    if case.augmentation == "ssd_crop":
        steps += [v2.RandomIoUCrop()]
    steps += [v2.RandomHorizontalFlip(0.5)]
    if case.augmentation in ("photometric", "ssd_crop"):
        steps += [v2.RandomApply([v2.ColorJitter(**ranges)], p=0.8)]
    if case.augmentation == "ssd_crop":
        steps += [v2.SanitizeBoundingBoxes()]
    if case.batch:
        image = ImageConfig()
        steps += [v2.Resize(image.shortest_side, max_size=image.longest_side, antialias=False)]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(image.mean, image.std)]
    return steps


def _lists(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    return [image for image, _ in samples], [target for _, target in samples]


def _pad(samples: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    """As torchvision's detectors: zeros at the right and bottom, to a multiple of 32."""
    sizes = [image.shape[-2:] for image, _ in samples]
    height, width = (-(-max(sides) // 32) * 32 for sides in zip(*sizes, strict=True))
    batch = torch.zeros(len(samples), 3, height, width)
    for slot, (image, _) in zip(batch, samples, strict=True):
        slot[:, : image.shape[-2], : image.shape[-1]] = image
    return batch, [target for _, target in samples]


def _parts(dataset: DetectionDataset, images: int = 60) -> dict[str, float]:
    """Shares of one sample's time without workers, median of each part."""
    decode, whole = [], []
    for index in range(min(images, len(dataset))):
        start = perf_counter()
        dataset.read(index)
        decode.append(perf_counter() - start)
        dataset[1, index]
        whole.append(perf_counter() - start - decode[-1])
    share = min(1.0, median(decode) / median(whole))
    return {"read and decode": share, "augment": 1 - share}
