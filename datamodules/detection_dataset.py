"""Images with boxes as a torch Dataset, whatever format they were read from.

Shape legend: `G` objects of an image, `H`, `W` its size in pixels, in the frame that its boxes refer to (see
`detector.use.reading`).
"""

import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from random import Random
from typing import Any, Final, NotRequired, TypedDict, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from datamodules.augmentation.recipes import Recipe
from datamodules.augmentation.samples import Sample
from datamodules.dataset_format import Id, ImageRecord
from datamodules.ground_truth import objects_of
from datamodules.image_cache import Decoder, ImageFile, ImageReader
from datamodules.parallel import leave_signals_to_parent
from detector.errors import InputError, TrainingError, brief
from detector.training.processes import remove_folder_as_orphan
from detector.use.reading import USUAL, Reading, read_header


class Target(TypedDict):
    """Ground truth of one image.

    `boxes` float32 (G, 4) xyxy pixels, `labels` int64 (G,) in 1..C, `difficult` bool (G,), `image_id` int64 0-d
    (position in the dataset), `file_name` of the image; where an augmentation drew one, `scale`: the factor by which
    the network's shortest side is multiplied.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    image_id: Tensor
    file_name: str
    scale: NotRequired[float]


def _size(record: ImageRecord) -> tuple[int, int]:
    """Return (height, width)."""
    if min(record.size) > 0:
        return record.size[1], record.size[0]
    header = read_header(_path(record))
    width, height = header.upright_size if record.upright else (header.width, header.height)
    return height, width


def _path(record: ImageRecord) -> Path:
    if record.path is None:
        raise ValueError(f"{record.name}: an image that is not there cannot be in a dataset")
    return record.path


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images with boxes; images are decoded on access, and the label of class i is i + 1.

    A sample's augmentation is a pure function of (seed, epoch, index): it depends on neither workers, ranks nor where a
    run was resumed. None leaves images alone. The ids say what results of detections call classes and images; None:
    1..C, and images by their positions.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        class_names: Sequence[str],
        augmentation: Recipe | None = None,
        seed: int = 0,
        reading: Reading = USUAL,
        category_ids: Sequence[Id] | None = None,
    ) -> None:
        self.class_names = list(class_names)
        self.augmentation = augmentation
        self.seed = seed
        self.files = [ImageFile(_path(record), record.upright, reading) for record in records]
        self.read: ImageReader = Decoder(self.files)  # or a cache
        # Flat arrays instead of one object per image: forked workers then share the memory.
        objects = objects_of(records, class_names)
        self._starts = np.searchsorted(objects.image_id, np.arange(len(records) + 1))
        self._boxes, self._labels, self._difficult = objects.box, objects.label, objects.difficult
        self.sizes = np.array([_size(record) for record in records], np.int64).reshape(-1, 2)  # height, width
        self.file_names: list[str] = [record.name for record in records]
        self.category_ids = category_ids
        self.image_ids: list[Id] | None = None
        if category_ids is not None:
            given = enumerate(record.stated.result_id for record in records)
            self.image_ids = [index if number is None else number for index, number in given]

    def __len__(self) -> int:
        return len(self.files)

    def image_path(self, index: int) -> Path:
        """Path of an image file."""
        return self.files[index].path

    def sample(self, index: int) -> Sample:
        """Return an image with its objects, without augmentation."""
        objects, image = slice(self._starts[index], self._starts[index + 1]), self.read(index)
        if image.shape[:2] != tuple(self.sizes[index]):
            (height, width), (was_high, was_wide) = image.shape[:2], self.sizes[index]
            raise InputError(
                f"{self.image_path(index)}: has {width} x {height} pixels now, and had {was_wide} x {was_high} when "
                "its boxes were read: they are of another image"
            )
        return Sample(image, self._boxes[objects], self._labels[objects], self._difficult[objects])

    def target(self, index: int) -> Target:
        """Return the ground truth of an image, boxes clipped to it, without augmentation and without decoding it."""
        objects = slice(self._starts[index], self._starts[index + 1])
        return self._target(index, self._boxes[objects], self._labels[objects], self._difficult[objects])

    def _target(
        self, index: int, boxes: NDArray[np.float32], labels: NDArray[np.int64], difficult: NDArray[np.bool_]
    ) -> Target:
        return Target(
            boxes=torch.from_numpy(boxes.copy()),
            labels=torch.from_numpy(labels.copy()),
            difficult=torch.from_numpy(difficult.copy()),
            image_id=torch.tensor(index, dtype=torch.int64),
            file_name=self.file_names[index],
        )

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Return the image, uint8 (3, H, W) RGB, and its target, of (epoch, index), or of an index alone in epoch 0.

        Raises:
            InputError: if the image cannot be decoded.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]  # IndexError beyond the end; counts negative ones from it
        sample, scale = self.sample(index), None
        if self.augmentation is not None:
            seed = np.random.SeedSequence([self.seed, epoch, index])
            try:
                sample, scale = self.augmentation(sample, seed, lambda rng: self._partner(index, rng))
            except InputError as error:
                if not str(error).startswith("--data.augmentation"):
                    raise
                raise InputError(f"{self.image_path(index)}: {error}") from error
        target = self._target(index, sample.boxes, sample.labels, sample.difficult)
        if scale is not None:
            target["scale"] = scale
        planes = np.empty((3, *sample.size), np.uint8)
        cv2.split(sample.image, list(planes))  # a tenth of NumPy's time
        return torch.from_numpy(planes), target

    def try_augmentation(self, draws: int = 8) -> None:
        """Augment the lowest and the narrowest image several times, to find what fails before a training does.

        Raises:
            InputError: The augmentation fails; names the image.
        """
        for index in sorted(set(self.sizes.argmin(axis=0).tolist())):
            for epoch in range(draws):
                self[epoch, index]

    def _partner(self, index: int, rng: Random) -> Sample:
        """Draw another image, all with equal probability; the same one where there is no other."""
        other = rng.randrange(max(1, len(self) - 1))
        return self.sample(other + (other >= index) if len(self) > 1 else index)


# ---- samples -> a batch, and its way from a worker process to training ----

SHARED_MEMORY: Final = Path("/dev/shm")
Batch = tuple[list[Tensor], list[Target]]


def collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    """Make lists of images, uint8 (3, H, W), and targets; in a worker, something that arrives as such a batch."""
    batch = [image for image, _ in samples], [target for _, target in samples]
    return batch if get_worker_info() is None else _Packed(batch)  # type: ignore[return-value]


class _Packed:
    """A batch that is pickled as one shared tensor and one array of each kind, and unpickled as a batch.

    Images differ in size, so a batch is a pair of lists. Sent as it is, each tensor of it would travel through a shared
    memory file of its own, five of them for every image; packed, a batch needs one.

    It is pickled when it is made: an error in the thread that sends it, such as one of a shared memory that is full,
    would be lost there, and the training would wait for the batch for ever.
    """

    def __init__(self, batch: Batch) -> None:
        self._pickled = bytes(ForkingPickler.dumps((_unpack, _packed(*batch))))

    def __reduce__(self) -> tuple[Callable[[bytes], Batch], tuple[bytes]]:
        return _received, (self._pickled,)


def _received(pickled: bytes) -> Batch:
    function, arguments = pickle.loads(pickled)
    batch: Batch = function(*arguments)
    return batch


def _packed(images: list[Tensor], targets: list[Target]) -> tuple[Any, ...]:
    # Made in shared memory, as torch's own collate does: moving a tensor there would copy it once more.
    size = sum(image.numel() for image in images)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        for left in SHARED_MEMORY.glob(f"torch_{os.getpid()}_*"):  # whoever opens these has them without a name
            left.unlink(missing_ok=True)
        there = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
        has = f", has {there.free / 1e6:.1f} of {there.total / 1e6:.1f} MB free" if there else ""
        raise TrainingError(
            f"a batch of {size / 1e6:.1f} MB does not fit into shared memory ({SHARED_MEMORY}{has}): give it more "
            f"(docker: --shm-size), or set data.num_workers 0, or fewer, or a smaller data.batch_size ({brief(error)})"
        ) from error
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    start = 0
    for image in images:
        flat[start : start + image.numel()].view(image.shape).copy_(image)
        start += image.numel()
    others = [
        {key: value for key, value in target.items() if key not in ("boxes", "labels", "difficult", "image_id")}
        for target in targets
    ]
    return (
        flat,
        [tuple(image.shape) for image in images],
        [len(target["boxes"]) for target in targets],
        _join(targets, "boxes"),
        _join(targets, "labels"),
        _join(targets, "difficult"),
        [int(target["image_id"]) for target in targets],
        others,
    )


def _join(targets: list[Target], key: str) -> NDArray[Any]:
    return np.concatenate([target[key].numpy() for target in targets])  # type: ignore[literal-required]


def _unpack(
    flat: Tensor,
    shapes: list[tuple[int, ...]],
    counts: list[int],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    difficult: NDArray[np.bool_],
    image_ids: list[int],
    others: list[dict[str, Any]],
) -> Batch:
    pixels = flat.split([int(np.prod(shape)) for shape in shapes])
    images = [part.view(shape) for part, shape in zip(pixels, shapes, strict=True)]
    columns = [torch.from_numpy(array).split(counts) for array in (boxes, labels, difficult)]
    targets = [
        cast(Target, {"boxes": box, "labels": label, "difficult": flag, "image_id": torch.tensor(image_id), **other})
        for box, label, flag, image_id, other in zip(*columns, image_ids, others, strict=True)
    ]
    return images, targets


def begin_worker(_worker: int) -> None:
    """Let a worker compute on one thread, as there are as many as cores are to be used, and end with the training."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    leave_signals_to_parent()
    remove_folder_as_orphan()
