"""The splits of a dataset, which images are in them, and what is wrong with that.

Splits that share images are a leak if one is for training and the other for validation or testing. What a split is for
is given, or else taken from its name: `train`, `trainval`, `val` (`valid`, `validation`, `dev`), `test`. A `trainval`
shares images with `train` and `val` by intention, and splits with other names share them with any.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from datamodules.dataset_format import DatasetFormat, Member
from datamodules.problems import Problem
from datamodules.splits import PARTS, Splits, parts_of
from detector.errors import InputError

Image = tuple[Path, str]  # that of a `Member`


@dataclass(frozen=True)
class UsedSplit:
    """A split, its file, its images, each once, and for which of "train", "val" and "test" it is, if known."""

    label: str
    path: Path
    parts: frozenset[str]
    members: tuple[Member, ...]

    def excludes(self, other: Self) -> bool:
        """Return whether the two must not share images."""
        return bool(self.parts) and bool(other.parts) and not self.parts & other.parts


@dataclass(frozen=True)
class SplitTable:
    """All splits that are examined, and what is wrong with their files; of chosen ones other images do not matter."""

    splits: tuple[UsedSplit, ...]
    chosen: bool
    problems: tuple[Problem, ...]

    def by_image(self) -> dict[Image, list[UsedSplit]]:
        """Return the splits that each image is in."""
        found: dict[Image, list[UsedSplit]] = {}
        for split in self.splits:
            for member in split.members:
                found.setdefault(member.image, []).append(split)
        return found


def read_split_table(format: DatasetFormat, chosen: Mapping[str, Sequence[str]]) -> SplitTable:
    """Read the splits that are chosen by part, or all that there are; InputError where a chosen one does not exist."""
    wanted = [(name, frozenset([part])) for part, names in chosen.items() for name in names]
    for name, _ in wanted:
        if not format.split_file(name).is_file():
            format.list_images([name])
    splits: list[UsedSplit] = []
    problems: list[Problem] = []
    for label, parts in wanted or [(name, parts_of(name)) for name in format.all_splits()]:
        path = format.split_file(label)
        try:
            counts = Counter(format.list_images([label], repeats=True))
        except InputError as error:
            counts = Counter()
            problems.append(Problem(str(path), None, "unusable_split", str(error)))
        splits.append(UsedSplit(label, path, parts, tuple(counts)))
        twice = [member.stem for member, count in counts.items() if count > 1]
        texts = [f"{path}: names the image {stem} more than once" for stem in twice]
        problems += [Problem(str(path), None, "named_twice", text) for text in texts]
    return SplitTable(tuple(splits), bool(wanted), tuple(problems))


def table_of_made(splits: Splits) -> SplitTable:
    """Return the parts of splits that are made, and those that are named beside them."""
    parts = {part: tuple(dict.fromkeys(splits.members(part))) for part in splits.given}
    root = splits.format.root
    return SplitTable(tuple(UsedSplit(part, root, frozenset([part]), of) for part, of in parts.items()), True, ())


def split_problems(table: SplitTable, files: Mapping[Image, Path]) -> Iterator[Problem]:
    """Yield what is wrong with the splits, beside missing images and annotations; problems name images by `files`."""
    yield from table.problems
    by_image = table.by_image()
    for (_, stem), splits in by_image.items():
        for index, split in enumerate(splits if table.chosen else ()):
            if any(split.parts == other.parts for other in splits[:index]):
                text = f"{split.path}: names {stem}, which another split for the same part names too"
                yield Problem(str(split.path), None, "named_twice", text)
        leaking = [split for split in splits if any(split.excludes(other) for other in splits)]
        if leaking:
            first = min(leaking, key=lambda split: min(map(PARTS.index, split.parts)))
            others = [split.label for split in leaking if split is not first]
            text = f"{first.path}: names {stem}, which is in {' and '.join(others)} too"
            yield Problem(str(first.path), None, "leak_by_name", text)
    if table.splits and not table.chosen:
        for image, path in files.items():
            if image not in by_image:
                yield Problem(str(path), None, "not_in_split", f"{path}: no split names {image[1]}", used=False)
