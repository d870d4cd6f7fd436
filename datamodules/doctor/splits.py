"""The splits of a dataset in VOC format, which images are in them, and what is wrong with that.

Splits that share images are a leak if one is for training and the other for validation or testing. What a split is for
is given, or else taken from its name: `train`, `trainval`, `val` (`valid`, `validation`, `dev`), `test`. A `trainval`
shares images with `train` and `val` by intention, and splits with other names share them with any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from datamodules.problems import Problem
from datamodules.voc.format import read_split, read_split_names
from datamodules.voc.layout import Split, dataset_folders, find_split, is_plain
from datamodules.voc.names import read_split_lines
from detector.errors import InputError

PARTS: Final = ("train", "val", "test")
_WORDS: Final = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "trainval"),
    "test": ("test", "testing"),
}


class ImageKey(NamedTuple):
    """Which image of a dataset.

    Args:
        folder: the dataset folder, with JPEGImages/ and Annotations/.
        stem: its name in split files.
    """

    folder: Path
    stem: str


@dataclass(frozen=True)
class UsedSplit:
    """A split and what it is for.

    Args:
        label: its name as on the command line.
        path: its file.
        parts: of "train", "val" and "test"; empty if unknown.
        members: its images, each once.
    """

    label: str
    path: Path
    parts: frozenset[str]
    members: tuple[ImageKey, ...]

    def excludes(self, other: UsedSplit) -> bool:
        """Whether the two must not share images."""
        return bool(self.parts) and bool(other.parts) and not self.parts & other.parts


@dataclass(frozen=True)
class SplitTable:
    """All splits that are examined.

    Args:
        splits: the splits.
        chosen: whether they were chosen, so that other images do not matter.
        problems: what is wrong with their files.
    """

    splits: tuple[UsedSplit, ...]
    chosen: bool
    problems: tuple[Problem, ...]

    def by_member(self) -> dict[ImageKey, list[UsedSplit]]:
        """The splits that each image is in."""
        found: dict[ImageKey, list[UsedSplit]] = {}
        for split in self.splits:
            for member in split.members:
                found.setdefault(member, []).append(split)
        return found


def read_split_table(root: Path, chosen: Mapping[str, Sequence[str]]) -> SplitTable:
    """Read split files.

    Args:
        root: as `--data.root`.
        chosen: names of splits by part; none: all split files but those of single classes ("name  1", "name -1").

    Raises:
        InputError: A chosen split file does not exist.
    """
    wanted: list[tuple[str, Split, frozenset[str]]] = []
    if any(chosen.values()):
        for part, names in chosen.items():
            wanted += [(name, find_split(root, name), frozenset([part])) for name in names]
        for _, split, _ in wanted:
            if not split.path.is_file():
                read_split(split.path)
    else:
        for folder in dataset_folders(root):
            year = "" if is_plain(root) else f"{folder.name.removeprefix('VOC')}_"
            for path in sorted((folder / "ImageSets" / "Main").glob("*.txt")):
                if not _is_of_one_class(path):
                    wanted.append((year + path.stem, Split(folder, path.stem), _parts_of(path.stem)))
    splits: list[UsedSplit] = []
    problems: list[Problem] = []
    for label, split, parts in wanted:
        names, found = _names(split.path)
        splits.append(UsedSplit(label, split.path, parts, tuple(ImageKey(split.folder, name) for name in names)))
        problems += found
    return SplitTable(tuple(splits), any(chosen.values()), tuple(problems))


def split_problems(table: SplitTable, files: Mapping[ImageKey, Path]) -> Iterator[Problem]:
    """What is wrong with the splits, beside images and annotations that are missing.

    Args:
        table: the splits.
        files: for each image of the dataset the file by which problems name it.
    """
    yield from table.problems
    by_member = table.by_member()
    for member, splits in by_member.items():
        if table.chosen:
            yield from _named_again(member, splits)
        leaking = [split for split in splits if any(split.excludes(other) for other in splits)]
        if leaking:
            first = min(leaking, key=_first_part)
            others = [split.label for split in leaking if split is not first]
            text = f"{first.path}: names {member.stem}, which is in {' and '.join(others)} too"
            yield Problem(str(first.path), None, "leak_by_name", text)
    if table.splits and not table.chosen:
        for member, path in files.items():
            if member not in by_member:
                yield Problem(str(path), None, "not_in_split", f"{path}: no split names {member.stem}", used=False)


def _named_again(member: ImageKey, splits: Sequence[UsedSplit]) -> Iterator[Problem]:
    for index, split in enumerate(splits):
        if any(split.parts == other.parts for other in splits[:index]):
            text = f"{split.path}: names {member.stem}, which another split for the same part names too"
            yield Problem(str(split.path), None, "named_twice", text)


def _names(path: Path) -> tuple[list[str], list[Problem]]:
    """The names in a split file, each once, and what is wrong with it."""
    try:
        counts = Counter(read_split_names(path))
        if not counts:
            read_split(path)
    except InputError as error:
        return [], [Problem(str(path), None, "unusable_split", str(error))]
    twice = [f"{path}: names the image {name} more than once" for name, count in counts.items() if count > 1]
    return list(counts), [Problem(str(path), None, "named_twice", text) for text in twice]


def _is_of_one_class(path: Path) -> bool:
    """Whether all lines state whether the image shows the class of the file."""
    try:
        lines = read_split_lines(path)
    except InputError:
        return False
    return bool(lines) and all(line.flagged for line in lines)


def _parts_of(name: str) -> frozenset[str]:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return frozenset(part for part, names in _WORDS.items() if words & set(names))


def _first_part(split: UsedSplit) -> int:
    return min(PARTS.index(part) for part in split.parts)
