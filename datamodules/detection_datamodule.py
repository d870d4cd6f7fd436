"""DetectionDataModule: images and boxes of any format for training and evaluation.

It is exact under workers, ranks and resumed runs.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datamodules.augmentation.recipes import Augmentation, build_augmentation
from datamodules.bad_data import NextImageInstead, OnError, read_usable
from datamodules.checks import check_classes
from datamodules.dataset_format import DatasetFormat
from datamodules.detection_dataset import Batch, DetectionDataset, Target, begin_worker, collate
from datamodules.ground_truth import SplitTruth, read_part
from datamodules.image_cache import CacheKind, check_cache, make_reader
from datamodules.samplers import EpochSampler, ShardSampler, done_so_far, go_on, group_by_aspect
from datamodules.splits import Leaks, Splits
from detector.errors import InputError
from detector.image_batch import ImageConfig
from detector.training.lightning_private import start_new_epoch
from detector.use.reading import Reading

__all__ = ["Batch", "DetectionDataModule", "collate"]


class DetectionDataModule(pl.LightningDataModule):
    """Data loaders over images and boxes, exact under workers, ranks and resumed runs.

    A run that has a folder sets `splits_folder`, where the lists of made splits are kept and looked for, and
    `report_folder`, for the list of what `on_error` skips.

    Args:
        format: Where the images and annotations are, and how they are read.
        split_names: Splits by part ("train", "val", "test"), in the format's own terms.
        class_names: Class names in label order; default: those of the format.
        augmentation: Training augmentation: none, flip, photometric, ssd_crop, multiscale, lsj, mosaic, mixup,
            copy_paste_boxes, or a list of class paths of albumentations, torchvision.transforms.v2 or one's own, with
            their arguments: [{class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}].
        batch_size: Training images per process and step.
        eval_batch_size: Evaluation images per process and step; default: batch_size.
        num_workers: Worker processes per data loader.
        seed: Seed of order and augmentation; default: seed_everything's, else 0.
        val_fraction: Share of the images of train_splits, or without these of all annotated images, to validate on
            instead of training on them, for datasets without a validation split. Which ones depends on their names and
            split_seed; a run keeps the lists in its folder, under splits/.
        split_seed: Another one divides the images otherwise; apart from seed, so that several runs validate on the same
            images.
        annotation_cache: Folder to keep parsed annotations in, or the word none; default: the environment variable
            FRCNN_CACHE_DIR, else ~/.cache/frcnn.
        allow_overlap: Accept images that are in more than one of train_splits, val_splits and test_splits. Without it
            training and testing refuse them, because a number on images that were trained on, or that a checkpoint was
            chosen by, is not one on unseen images. Where only two sets of images exist, validate on the second and
            give no test_splits.
        on_error: What to do about data that cannot be used: raise stops before the first step with the complete list;
            skip leaves out each such object or image, in evaluations too, says how many, and writes the list into the
            run's folder. Of an image in two of train, val and test the first is without it. An image that turns out
            undecodable in the middle of a training stops it, or with skip the next image takes its place. frcnn doctor
            lists all beforehand.
        group_by_aspect: Put training images of similar aspect ratio into a batch, and say how much padding that saves.
            By the files' sizes: of little use with ssd_crop, which changes them.
        cache_images: Keep decoded training images: none, memory (shared by the workers; height x width x 3 bytes for
            each image and process) or disk (as many bytes, used again by later runs).
        image_cache_dir: Folder of cache_images disk; default: ~/.cache/frcnn/images, or images/ in FRCNN_CACHE_DIR.
        bit_depth: Bits of the values in 16-bit images: 12 for a 12-bit camera, whose images are nearly black otherwise.
            A checkpoint keeps it, and frcnn predict reads images by it.
        max_pixels: Images with more pixels (width x height) are refused, before they are decoded.

    Raises:
        InputError: For bad values; `setup` raises it for anything wrong with the files.
    """

    def __init__(
        self,
        format: DatasetFormat,
        split_names: Mapping[str, list[str]],
        class_names: list[str] | None = None,
        augmentation: Augmentation = "flip",
        batch_size: int = 2,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        val_fraction: float | None = None,
        split_seed: int = 0,
        annotation_cache: str | None = None,
        allow_overlap: bool = False,
        on_error: OnError = "raise",
        group_by_aspect: bool = False,
        cache_images: CacheKind = "none",
        image_cache_dir: str | None = None,
        bit_depth: int = 16,
        max_pixels: int = Reading.max_pixels,
    ) -> None:
        super().__init__()
        self.reading = Reading(bit_depth, max_pixels)
        # Into checkpoints: for `frcnn predict`, and to tell how the data was read.
        self.save_hyperparameters({"bit_depth": bit_depth, "data_format": format.name}, logger=False)
        # Fewer evaluation images than ranks leave a rank without any, which Lightning refuses unless told so.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.format = format
        self.format.read_by(annotation_cache, self.reading)
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.on_error = on_error
        self.report_folder: Path | None = None
        self.group_by_aspect = group_by_aspect
        self.cache_images = cache_images
        self.image_cache_dir = image_cache_dir
        for key, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, key) < least:
                raise InputError(f"--data.{key} is {getattr(self, key)}; it must be at least {least}")
        self.splits = Splits(format, split_names, val_fraction, split_seed, allow_overlap)
        build_augmentation(augmentation)
        check_cache(cache_images, image_cache_dir)
        self.class_names = list(
            class_names or format.class_names(self.splits.all_names, everything=not self.splits.names["train"])
        )
        check_classes(self.class_names)
        self._datasets: dict[str, DetectionDataset] = {}
        self._resume: dict[str, int] = {}

    @property
    def splits_folder(self) -> Path | None:
        """Return the folder where the lists of made splits are kept and looked for."""
        return self.splits.folder

    @splits_folder.setter
    def splits_folder(self, folder: Path | None) -> None:
        self.splits.folder = folder

    def setup(self, stage: str | None = None) -> None:
        """Read and check all annotations that the stage ("fit", "validate", "test"; None: all) needs.

        Raises:
            InputError: Anything wrong with the files; for "fit", "test" and None also images that are in more than one
                of the train, val and test splits, unless `allow_overlap`.
        """
        self.format.check_root()
        parts = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": []}
        wanted = [part for part in (parts[stage] if stage else self.splits.given) if part not in self._datasets]
        # With `skip` also before a validation, so that it is on the same images as in the training.
        overlap_counts = stage in (None, "fit", "test") or self.on_error == "skip"
        leaks = self.splits.leaks() if overlap_counts else Leaks()
        reports = {"validate": "data_problems_validate.json", "test": "data_problems_test.json"}
        self._read_parts(wanted, leaks, True, reports.get(stage or "", "data_problems.json"))
        self.splits.keep()  # not before all else is well: a failed start leaves no run folder
        if stage is None or set(self._datasets) >= set(self.splits.given):
            self.format.forget()

    def _dataset(self, part: str) -> DetectionDataset:
        if part not in self._datasets:
            self._read_parts([part])
        return self._datasets[part]

    def _read_parts(
        self,
        parts: Sequence[str],
        leaks: Leaks | None = None,
        look_for_cut_images: bool = False,
        report: str = "data_problems.json",
    ) -> None:
        """Make the datasets of parts, or raise InputError with all that is wrong."""
        where = self.report_folder / report if self.report_folder is not None else None
        members = {part: self.splits.members(part) for part in parts}
        found = read_usable(
            self.format, self.class_names, members, leaks or Leaks(), self.on_error, look_for_cut_images, where
        )
        for part, records in found.items():
            self.splits.check_given(part)
            augmentation = build_augmentation(self.augmentation) if part == "train" else None
            ids = None if part == "train" else self.format.category_ids(self.splits.sources(part), self.class_names)
            dataset = DetectionDataset(records, self.class_names, augmentation, self.seed, self.reading, ids)
            self._datasets[part] = dataset
            if part == "train":
                processes = self.trainer.num_devices if self.trainer is not None else 1
                files, sizes = dataset.files, dataset.sizes
                dataset.read = make_reader(self.cache_images, files, sizes, self.image_cache_dir, processes)

    def ground_truth(self, part: str) -> SplitTruth:
        """Return the objects of "train", "val" or "test" as arrays; the images need not be there.

        Raises:
            InputError: As `read_ground_truth`.
        """
        return read_part(self.splits, part, self.class_names, self.on_error == "skip")

    @property
    def train_dataset(self) -> DetectionDataset:
        """Return the images of the train splits."""
        return self._dataset("train")

    @property
    def val_dataset(self) -> DetectionDataset:
        """Return the images of the val splits."""
        return self._dataset("val")

    @property
    def test_dataset(self) -> DetectionDataset:
        """Return the images of the test splits."""
        return self._dataset("test")

    @property
    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Target]]:
        """Shuffled; the last, smaller batch is left out unless the split is smaller than one batch over all ranks."""
        world_size, rank = self._world
        dataset = self.train_dataset
        drop_last = len(dataset) >= self.batch_size * world_size
        sampler = EpochSampler(dataset, world_size, rank, self.seed, drop_last)
        if self.group_by_aspect:
            model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
            config = getattr(model, "image_config", None) or ImageConfig()
            sampler = group_by_aspect(sampler, dataset.sizes, self.batch_size, config)
        state, self._resume = self._resume, {}
        if state:
            go_on(sampler, state, self._resume_terms())
            if self.trainer is not None:
                start_new_epoch(self.trainer)
        return self._loader(dataset, sampler, self.batch_size, drop_last)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Target]]:
        """Give each image once over all ranks, in order."""
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Target]]:
        """Give each image once over all ranks, in order; raise InputError if no test splits are given."""
        return self._eval_loader(self.test_dataset)

    def _eval_loader(self, dataset: DetectionDataset) -> DataLoader[tuple[Tensor, Target]]:
        return self._loader(dataset, ShardSampler(dataset, *self._world), self.eval_batch_size, drop_last=False)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to a GPU; on a CPU there is nothing to move, and a walk through all tensors to be saved."""
        if device.type == "cpu":
            return batch
        return cast(Batch, super().transfer_batch_to_device(batch, device, dataloader_idx))

    def _loader(
        self, dataset: DetectionDataset, sampler: Sampler[object], batch_size: int, drop_last: bool
    ) -> DataLoader[tuple[Tensor, Target]]:
        # Pinned memory is copied faster to a GPU.
        to_gpu = torch.cuda.is_available() if self.trainer is None else self.trainer.strategy.root_device.type == "cuda"
        if self.num_workers:
            get_temp_dir()  # else each worker has a folder of its own, which stays behind if it is killed
        return DataLoader(
            NextImageInstead(dataset) if self.on_error == "skip" else dataset,
            batch_size=batch_size,
            sampler=cast(Iterable[object], sampler),
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=to_gpu,
            drop_last=drop_last,
            worker_init_fn=begin_worker,
            persistent_workers=self.num_workers > 0,
        )

    # ---- resuming in the middle of an epoch ----

    def state_dict(self) -> dict[str, int]:
        """Return where training goes on: `epoch` and the number of its `batches` already done on each rank.

        With them goes what these numbers hang on (`batch_size`, `world_size`, `seed`, `images`, `group_by_aspect`).
        """
        if self.trainer is None or "train" not in self._datasets:
            return {}
        return done_so_far(self.trainer) | self._resume_terms()

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Remember where to go on; the next training loader starts there."""
        self._resume = dict(state_dict)

    def _resume_terms(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size,
            "world_size": self._world[0],
            "seed": self.seed,
            "images": len(self.train_dataset),
            "group_by_aspect": int(self.group_by_aspect),
        }


class FormatDataModule(DetectionDataModule):
    """Images and boxes in a format that is read from a folder, with splits by name.

    Args:
        root: Dataset folder, as the format has it.
        train_splits: Splits to train on, of those that the format offers.
        val_splits: Splits to validate on; with val_fraction none.
        test_splits: Splits to test on; never taken from the others.
        class_names: Class names in label order; default: those of the format.
        options: Those of `DetectionDataModule`.

    Raises:
        InputError: for a missing root or bad values; `setup` raises it for anything wrong with the files.
    """

    reader: ClassVar[type[DatasetFormat]]

    def __init__(
        self,
        root: str,
        train_splits: list[str] | None = None,
        val_splits: list[str] | None = None,
        test_splits: list[str] | None = None,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        splits = {"train": train_splits or [], "val": val_splits or [], "test": test_splits or []}
        format = self.reader(root)
        format.check_root()
        super().__init__(format, splits, class_names, **options)
