"""YoloFormat: the images and labels of a dataset in YOLO's text format, found, read and judged."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from datamodules.checks import judge
from datamodules.dataset_format import DatasetFormat, ImageRecord, Member, Stated
from datamodules.problems import Problem
from datamodules.splits import parts_of
from datamodules.text_files import decode_text
from datamodules.yolo.format import SPLIT_KEYS, THING, Description, is_label, read_description, read_label
from detector.errors import InputError, brief, listed
from detector.use.reading import SUFFIXES, USUAL, ImageHeader, Reading

_IMAGES = ("images", "JPEGImages")  # folders beside which labels/ is


class YoloFormat(DatasetFormat):
    """A dataset in YOLO's text format: a folder, or the data.yaml in it.

    Args:
        root: As `--data.root`.
        reading: How image files are read.
    """

    name = "yolo"

    def __init__(self, root: str | Path, reading: Reading = USUAL) -> None:
        super().__init__(root, reading)
        self.file, self.root = self.root, self.root.parent if self.root.is_file() else self.root
        self._description: Description | None = None

    @property
    def description(self) -> Description:
        """Return what the dataset says of itself, read once."""
        if self._description is None:
            self._description = read_description(self.file)
        return self._description

    def check_root(self) -> None:
        """Raise InputError unless the root is a folder with labels, or data.yaml."""
        super().check_root()
        if self.offered() is None:
            text = "holds neither data.yaml nor labels/ nor label files beside images"
            raise InputError(f"--data.root {self.root}: {text}{self.other_format()}")

    def offered(self) -> list[str] | None:
        """Return the parts in data.yaml of which something is there, else folders and lists such as train.

        None where there are neither parts nor label files.
        """
        described = self.description.splits
        if described:
            return [part for part, places in described.items() if any(map(Path.exists, places))]
        patterns = ("labels/*.txt", "labels/*/*.txt", "*/labels/*.txt", "*.txt", "*/*.txt")
        if not any(is_label(path) for pattern in patterns for path in _some(self.root, pattern)):
            return None
        places = [*self.root.glob("images/*/"), *self.root.glob("*/images/"), *self.root.glob("*/")]
        names = {(place.parent if place.name in _IMAGES else place).name: None for place in sorted(places)}
        lists = [path.stem for path in sorted(self.root.glob("*.txt")) if path.name != "classes.txt"]
        return [name for name in dict.fromkeys([*names, *lists]) if parts_of(name) and self._find(name)]

    def class_names(self, splits: Sequence[str], everything: bool = False) -> list[str]:
        """Return the names in data.yaml, or those of a list of names."""
        if self.description.names is None:
            text = "names no classes, in data.yaml or classes.txt; write them there, or give --data.class_names"
            raise InputError(f"{self.root}: {text}")
        return list(self.description.names.values())

    def known_classes(self, splits: Sequence[str]) -> Sequence[str] | None:
        """Return the names of the classes."""
        return None if self.description.names is None else self.class_names(splits)

    def split_file(self, split: str) -> Path:
        """Return the folder or the list of images that a split means; raise InputError where there is none."""
        return self._places(split)[0]

    def _places(self, split: str) -> Sequence[Path]:
        found = self.description.splits.get(SPLIT_KEYS.get(split, split)) or self._find(split)
        if not found:
            there = listed(self.offered() or []) or "none; --data.val_fraction 0.2 makes some"
            raise InputError(f"{self.description.file or self.root}: has no split {split!r}; there are {there}")
        return found

    def _find(self, split: str) -> list[Path]:
        """Return the place that a name means in folders: images/train, train/images, train or train.txt."""
        alike = [split, *(name for name, part in SPLIT_KEYS.items() if part == SPLIT_KEYS.get(split))]
        root = self.root
        places = ((root / "images" / one, root / one / "images", root / one, root / f"{one}.txt") for one in alike)
        found = (path for paths in places for path in paths if os.path.isdir(path) or path.suffix == ".txt")
        return [path for path in found if os.path.exists(path) and path != root][:1]

    def list_images(self, splits: Sequence[str], missing_ok: bool = False, repeats: bool = False) -> list[Member]:
        """Return the images of folders and lists, in order, and where labels have no images these too."""
        members: list[Member] = []
        for split in splits:
            try:
                places = self._places(split)
            except InputError:
                if missing_ok:
                    continue
                raise
            paths = [(path, place) for place in places for path in self._images(place)]
            if not paths:
                raise InputError(f"{places[0]}: holds no image, so there are none in the split {split!r}")
            twice = [path for path, count in Counter(path for path, _ in paths).items() if count > 1]
            if twice and not repeats:
                raise InputError(f"{places[0]}: names the image {twice[0]} more than once")
            members += [self._member(path, place) for path, place in paths]
        return members

    def _member(self, path: Path, source: Path) -> Member:
        return Member(Path(os.path.relpath(path, self.root)).as_posix(), path.parent, path.name, source)

    def _images(self, place: Path) -> list[Path]:
        """Return the images of a folder or a list, and those that labels beside them should have."""
        if not os.path.isdir(place):
            return self._listed(place)
        paths = [path for path in place.rglob("*") if _is_image(path)]
        expected = {label_path(path) for path in paths}
        labels = _swapped(place, _IMAGES, "labels").rglob("*.txt")
        alone = [path for path in labels if path not in expected and is_label(path)]
        return sorted([*paths, *(_swapped(path.with_suffix(".jpg"), ("labels",), "images") for path in alone)])

    def _listed(self, file: Path) -> list[Path]:
        """Return the images of a list, whose lines may begin with folders of the machine where it was written."""
        try:
            lines = decode_text(file.read_bytes(), file, "a list of images").splitlines()
        except OSError as error:
            raise InputError(f"{file}: no such folder of images, nor list of them ({brief(error)})") from error
        found: list[Path] = []
        for line in filter(None, map(str.strip, lines)):
            parts = [part for part in Path(line.replace("\\", "/")).parts if part not in (".", "..")]
            ends = (Path(*parts[start:]) for start in range(len(parts)))
            candidates = (folder / end for end in ends for folder in (file.parent, self.root))
            path = next(filter(os.path.isfile, candidates), file.parent / line)
            found.append(self.root / os.path.relpath(path, self.root))
        return found

    def list_others(self, members: Iterable[Member], look: bool) -> list[Member]:
        """Return the images that are not among `members`, with a label or without: without one they show nothing."""
        known = {member.image for member in members}
        place = self.root / "images" if (self.root / "images").is_dir() else self.root
        described = (place for places in self.description.splits.values() for place in places if os.path.exists(place))
        others = {path: self._member(path, place) for place in (*described, place) for path in self._images(place)}
        return [member for _, member in sorted(others.items()) if member.image not in known]

    def read(
        self, members: Sequence[Member], class_names: Sequence[str] | None, look: bool = True
    ) -> list[ImageRecord]:
        """Read and judge labels and the headers of images."""
        paths = [member.folder / member.stem for member in members]
        there = [path for path in paths if os.path.isfile(path)] if look else []
        headers = self.cache(self.root).headers(there)
        records: list[ImageRecord] = []
        for path, name in zip(paths, self._names(members), strict=True):
            header = headers.get(path)
            size = header.upright_size if isinstance(header, ImageHeader) else (0, 0)
            stated = self._stated(label_path(path), size, class_names)
            if look and header is None:
                text = f"{path}: no such image, but there is {stated.file}, or a list names it"
                stated.problems.append(Problem(str(path), None, "missing_image", text))
            records.append(judge(stated, name, path if header is not None else None, header, class_names))
        return records

    def _stated(self, file: Path, size: tuple[int, int], class_names: Sequence[str] | None) -> Stated:
        try:
            text = decode_text(file.read_bytes(), file, "a label file")
        except FileNotFoundError:
            text = ""
        except (OSError, InputError) as error:
            message = str(error) if isinstance(error, InputError) else f"{file}: cannot be read ({brief(error)})"
            return Stated(file, THING, size, problems=[Problem(str(file), None, "unreadable_annotation", message)])
        names = self.description.names or (dict(enumerate(class_names)) if class_names else None)
        label = read_label(text, file, size, names, self.description.keypoints)
        if label.polygons:
            self.say(f"{self.root}: polygons in label files are read as the boxes around them")
        return Stated(file, THING, size, label.objects, label.problems)

    def image_names(self, members: Sequence[Member]) -> tuple[str, ...]:
        """Return the file names without suffix, with folders where they are not distinct without."""
        return tuple(name.rpartition(".")[0] for name in self._names(members))

    def _names(self, members: Sequence[Member]) -> list[str]:
        bare = [member.stem for member in members]
        return bare if len(set(bare)) == len(bare) else [member.name for member in members]

    def empty_folders(self, members: Iterable[Member]) -> list[Path]:
        """Return the root if not one of the images is there."""
        return [] if any(os.path.isfile(member.folder / member.stem) for member in members) else [self.root]


def label_path(image: Path) -> Path:
    """Return the label file of an image: in labels/ where the image is in images/, else beside it."""
    beside = image.with_suffix(".txt")
    swapped = _swapped(beside, _IMAGES, "labels")
    there = os.path.isfile(swapped) or (os.path.isdir(swapped.parent) and not os.path.isfile(beside))
    return swapped if there else beside


def _swapped(path: Path, folders: Sequence[str], other: str) -> Path:
    """Return a path with another folder for the last one that is among `folders`; the same where there is none."""
    parts = path.parts
    last = next((index for index in reversed(range(len(parts))) if parts[index] in folders), None)
    return path if last is None else Path(*parts[:last], other, *parts[last + 1 :])


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in SUFFIXES and path.name[0] != "."


def _some(root: Path, pattern: str) -> list[Path]:
    """Return a few of the files that may be label files."""
    found = (path for path in root.glob(pattern) if path.name != "classes.txt" and path.stat().st_size)
    return [path for _, path in zip(range(5), found, strict=False)]
