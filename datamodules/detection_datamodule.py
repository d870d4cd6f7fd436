"""DetectionDataModule: what training and evaluation do with images and boxes of any format, exact under workers, ranks
and resumed runs."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datamodules.augmentation.recipes import Augmentation, build_augmentation
from datamodules.bad_data import NextImageInstead, OnError, Policy
from datamodules.batches import Batch, collate, limit_threads
from datamodules.detection_dataset import DetectionDataset, ImageRecord, Target
from datamodules.file_cache import FileCache, FileStore
from datamodules.image_cache import CacheKind, check_cache, make_reader
from datamodules.image_reading import Reading
from datamodules.problems import Problem
from datamodules.samplers import EpochSampler, ShardSampler, done_so_far, go_on, group_by_aspect
from datamodules.splits import Leaks, Member, divide, find_leaks, keep_lists, read_lists
from detector.errors import InputError
from detector.image_batch import ImageConfig
from detector.training.lightning_private import start_new_epoch

__all__ = ["PARTS", "Batch", "DetectionDataModule", "collate"]

PARTS: Final = ("train", "val", "test")


class DetectionDataModule(pl.LightningDataModule):
    """Data loaders over images and boxes. A format derives from this, says where its images and annotations are, and
    calls `_set_class_names` at the end of its construction. A run that has a folder sets `splits_folder`, where the
    lists of made splits are kept and looked for, and `report_folder`, for the list of what `on_error` skips.

    Args:
        root: Folder of the dataset.
        split_names: Splits by part ("train", "val", "test"), in the format's own terms.
        augmentation: Training augmentation: none, flip, photometric, ssd_crop, multiscale, mosaic, mixup,
            copy_paste_boxes, or a list of class paths of albumentations with their arguments:
            [{class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}].
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
        InputError: for bad values; `setup` raises it for anything wrong with the files.
    """

    class_names: list[str]
    cache_kind: ClassVar[type[FileCache]] = FileCache
    """What is kept of the files that were read."""

    def __init__(
        self,
        root: str,
        split_names: Mapping[str, list[str]],
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
        self.save_hyperparameters({"bit_depth": bit_depth}, logger=False)  # into checkpoints, for `frcnn predict`
        # Fewer evaluation images than ranks leave a rank without any, which Lightning refuses unless told so.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.root = Path(root).expanduser()
        self.split_names = {part: list(split_names.get(part, [])) for part in PARTS}
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.splits_folder: Path | None = None
        self.on_error = on_error
        self.report_folder: Path | None = None
        self.allow_overlap = allow_overlap
        self.group_by_aspect = group_by_aspect
        self.cache_images = cache_images
        self.image_cache_dir = image_cache_dir
        self._check_values()
        self._store: FileStore[FileCache] = FileStore(self.cache_kind, annotation_cache, self.reading)
        self._made: dict[str, list[Member]] = {}
        self._new_lists: dict[str, list[str]] = {}
        self._datasets: dict[str, DetectionDataset] = {}
        self._resume: dict[str, int] = {}

    # ---- what a format says ----

    @abstractmethod
    def _find_class_names(self) -> list[str]:
        """The classes where none are given, in label order."""

    @abstractmethod
    def _check_root(self) -> None:
        """Raise InputError unless the dataset is there."""

    @abstractmethod
    def _list_images(self, part: str, missing_ok: bool = False) -> list[Member]:
        """The images that the splits of "train", "val" or "test" name, in order.

        Args:
            part: its splits are `self.split_names[part]`; none: no images.
            missing_ok: leave out splits that are not there instead of raising InputError.
        """

    @abstractmethod
    def _list_annotated(self) -> list[Member]:
        """All annotated images, to be divided where no splits are named."""

    @abstractmethod
    def _read_members(self, members: Sequence[Member]) -> tuple[list[ImageRecord], list[Problem]]:
        """The images that can be used, in order, with those of their objects that can, and all that is wrong."""

    def _category_ids(self, part: str) -> Sequence[int | str] | None:
        """What the files of "val" or "test" call the classes, in label order; None: 1..C, and images by position."""
        return None

    def _forget(self) -> None:
        """Free what was only needed for reading."""
        self._store.forget()

    # ---- what is common ----

    def _check_values(self) -> None:
        for key, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, key) < least:
                raise InputError(f"--data.{key} is {getattr(self, key)}; it must be at least {least}")
        if self.val_fraction is None:
            for part in ("train", "val"):
                if not self.split_names[part]:
                    raise InputError(
                        f"--data.{part}_splits is empty; name at least one split, or have splits made, for example by "
                        "--data.val_fraction 0.2"
                    )
        elif not 0 < self.val_fraction < 1:
            raise InputError(f"--data.val_fraction is {self.val_fraction}; it must be between 0 and 1")
        elif self.split_names["val"]:
            raise InputError(
                "--data.val_fraction takes images to validate on from those to train on, but --data.val_splits is "
                f"[{', '.join(self.split_names['val'])}]; give one of the two"
            )
        build_augmentation(self.augmentation)
        check_cache(self.cache_images, self.image_cache_dir)

    def _set_class_names(self, given: list[str] | None) -> None:
        self.class_names = list(given) if given else self._find_class_names()
        if len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"--data.class_names names a class twice: {', '.join(self.class_names)}")

    def setup(self, stage: str | None = None) -> None:
        """Read and check all annotations that the stage ("fit", "validate", "test"; None: all) needs.

        Raises:
            InputError: Anything wrong with the files; for "fit", "test" and None also images that are in more than one
                of the train, val and test splits, unless `allow_overlap`.
        """
        self._check_root()
        parts = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": []}
        wanted = [part for part in (parts[stage] if stage else self._given()) if part not in self._datasets]
        leaks = Leaks()
        # With `skip` also before a validation, so that it is on the same images as in the training.
        if not self.allow_overlap and (stage in (None, "fit", "test") or self.on_error == "skip"):
            leaks = find_leaks({part: self._members(part, missing_ok=True) for part in self._given()})
        reports = {"validate": "data_problems_validate.json", "test": "data_problems_test.json"}
        self._read_parts(wanted, leaks, True, reports.get(stage or "", "data_problems.json"))
        if self._new_lists:  # not before all else is well: a failed start leaves no run folder
            keep_lists(self.splits_folder, self._new_lists, self._made_by)
            self._new_lists = {}
        if stage is None or set(self._datasets) >= set(self._given()):
            self._forget()

    def _given(self) -> list[str]:
        """The parts that there are."""
        return [
            part
            for part, names in self.split_names.items()
            if names or (self.val_fraction is not None and part in ("train", "val"))
        ]

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
        folder = self.report_folder
        where = folder / report if folder is not None else None
        policy = Policy(self.on_error, look_for_cut_images, where, self.reading)
        members = {part: self._members(part) for part in parts}
        for part, records in policy.apply(members, self._read_members, leaks or Leaks()).items():
            if part not in self._given():
                raise InputError(f"no {part} splits are given; set --data.{part}_splits")
            augmentation = build_augmentation(self.augmentation) if part == "train" else None
            ids = self._category_ids(part) if part != "train" else None
            self._datasets[part] = DetectionDataset(
                records, self.class_names, augmentation, self.seed, self.reading, ids
            )
            if part == "train":
                self._cache_images(self._datasets[part])

    def _cache_images(self, dataset: DetectionDataset) -> None:
        processes = self.trainer.num_devices if self.trainer is not None else 1
        dataset.read = make_reader(self.cache_images, dataset.files, dataset.sizes, self.image_cache_dir, processes)

    def _members(self, part: str, missing_ok: bool = False) -> list[Member]:
        """The images of a part, made or listed."""
        if self.val_fraction is None or part == "test":
            return self._list_images(part, missing_ok)
        if not self._made:
            self._made = self._divide(self.val_fraction)
        return self._made[part]

    def _divide(self, val_fraction: float) -> dict[str, list[Member]]:
        """Images to train and to validate on: as this run had them before, else made now."""
        images = {member.name: member for member in self._to_divide()}
        folder = self.splits_folder
        lists = read_lists(folder, self._made_by) if folder is not None else None
        if lists is None:
            train, val = divide(list(images), val_fraction, self.split_seed)
            lists = self._new_lists = {"train": train, "val": val}
        gone = [name for names in lists.values() for name in names if name not in images]
        if gone:
            raise InputError(f"{folder}: {len(gone)} images of this run's splits ({gone[0]}) are not in the dataset")
        return {part: [images[name] for name in names] for part, names in lists.items()}

    @property
    def _made_by(self) -> dict[str, float | None]:
        return {"val_fraction": self.val_fraction, "split_seed": self.split_seed}

    def _to_divide(self) -> list[Member]:
        if self.split_names["train"]:
            return self._list_images("train")
        tested = {(member.folder, member.stem) for member in self._list_images("test", missing_ok=True)}
        return [member for member in self._list_annotated() if (member.folder, member.stem) not in tested]

    @property
    def train_dataset(self) -> DetectionDataset:
        return self._dataset("train")

    @property
    def val_dataset(self) -> DetectionDataset:
        return self._dataset("val")

    @property
    def test_dataset(self) -> DetectionDataset:
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
            sampler = group_by_aspect(sampler, dataset.sizes, self.batch_size, self._image_config)
        self._resume_into(sampler)
        return self._loader(dataset, sampler, self.batch_size, drop_last)

    @property
    def _image_config(self) -> ImageConfig:
        """How the network that is trained resizes; the default where none is."""
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        config = getattr(model, "image_config", None)
        return config if isinstance(config, ImageConfig) else ImageConfig()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Target]]:
        """Each image once over all ranks, in order."""
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Target]]:
        """Each image once over all ranks, in order; raises `InputError` if no test splits are given."""
        return self._eval_loader(self.test_dataset)

    def _eval_loader(self, dataset: DetectionDataset) -> DataLoader[tuple[Tensor, Target]]:
        return self._loader(dataset, ShardSampler(dataset, *self._world), self.eval_batch_size, drop_last=False)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """As Lightning does it; on a CPU there is nothing to move, and a walk through all tensors to be saved."""
        if device.type == "cpu":
            return batch
        return cast(Batch, super().transfer_batch_to_device(batch, device, dataloader_idx))

    def _loader(
        self, dataset: DetectionDataset, sampler: Sampler[object], batch_size: int, drop_last: bool
    ) -> DataLoader[tuple[Tensor, Target]]:
        return DataLoader(
            NextImageInstead(dataset) if self.on_error == "skip" else dataset,
            batch_size=batch_size,
            sampler=cast(Iterable[object], sampler),
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self._on_gpu,
            drop_last=drop_last,
            worker_init_fn=limit_threads,
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _on_gpu(self) -> bool:
        """Whether batches go to a GPU, to which pinned memory is copied faster."""
        if self.trainer is None:
            return torch.cuda.is_available()
        return self.trainer.strategy.root_device.type == "cuda"

    # ---- resuming in the middle of an epoch ----

    def state_dict(self) -> dict[str, int]:
        """Where training goes on: `epoch` and the number of its `batches` already done on each rank, with what these
        numbers hang on (`batch_size`, `world_size`, `seed`, `images`, `group_by_aspect`)."""
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

    def _resume_into(self, sampler: EpochSampler) -> None:
        state, self._resume = self._resume, {}
        if not state:
            return
        go_on(sampler, state, self._resume_terms())
        if self.trainer is not None:
            start_new_epoch(self.trainer)
