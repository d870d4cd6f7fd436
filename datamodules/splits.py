"""Which images are trained on, validated on and tested on: named splits, splits made with a seed, images in two."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Final

from datamodules.dataset_format import DatasetFormat, Member
from datamodules.doctor.near_duplicates import FingerprintCache
from datamodules.image_cache import ImageFile
from datamodules.problems import Problem
from detector.errors import InputError, brief
from detector.files import write_json, write_whole

PARTS: Final = ("train", "val", "test")
_WORDS: Final = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "trainval"),
    "test": ("test", "testing"),
}
MADE_BY: Final = "made_by.json"  # written last: where it is, the lists beside it are whole


def parts_of(name: str) -> frozenset[str]:
    """Return what a split is for, by the words in its name; nothing where these do not tell."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return frozenset(part for part, names in _WORDS.items() if words & set(names))


class Splits:
    """The images of each part ("train", "val", "test") of a dataset.

    Args:
        format: Knows the dataset's own splits.
        names: Names of these by part.
        val_fraction: Share of the images to validate on where no split is named for that.
        split_seed: Another one divides the images otherwise.
        allow_overlap: Accept images that are in two parts.

    Attributes:
        folder: Where a run keeps the lists of made splits, and looks for them.

    Raises:
        InputError: The values contradict each other.
    """

    def __init__(
        self,
        format: DatasetFormat,
        names: Mapping[str, Sequence[str]],
        val_fraction: float | None = None,
        split_seed: int = 0,
        allow_overlap: bool = False,
    ) -> None:
        self.format = format
        self.names = {part: list(names.get(part, [])) for part in PARTS}
        self.made_by = {"val_fraction": val_fraction, "split_seed": split_seed}
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.allow_overlap = allow_overlap
        self.folder: Path | None = None
        self._made: dict[str, list[Member]] = {}
        self._new_lists: dict[str, list[str]] = {}
        self._together: list[list[str]] = []
        if val_fraction is None:
            for part in ("train", "val"):
                if not self.names[part]:
                    raise InputError(
                        f"--data.{part}_splits is empty; name at least one split, or have splits made, for example by "
                        "--data.val_fraction 0.2"
                    )
        elif not 0 < val_fraction < 1:
            raise InputError(f"--data.val_fraction is {val_fraction}; it must be between 0 and 1")
        elif self.names["val"]:
            raise InputError(
                "--data.val_fraction takes images to validate on from those to train on, but --data.val_splits is "
                f"[{', '.join(self.names['val'])}]; give one of the two"
            )
        elif not self.names["train"] and format.needs_splits:
            raise InputError(
                "--data.val_fraction divides the images of --data.train_splits, which is empty; name at least one "
                f"{format.needs_splits}"
            )

    @property
    def given(self) -> list[str]:
        """Return the parts that there are."""
        made = ("train", "val") if self.val_fraction is not None else ()
        return [part for part, names in self.names.items() if names or part in made]

    def check_given(self, part: str) -> None:
        """Raise InputError unless there is this part; the message says what else can be done."""
        if part not in self.given:
            others = [name for name in self.format.offered() or [] if part in parts_of(name)]
            there = f" (there is {others[0]})" if others else ""
            text = f"no {part} splits are given; set --data.{part}_splits{there}"
            raise InputError(f"{text}, or score the validation splits by frcnn validate" if part == "test" else text)

    @property
    def all_names(self) -> list[str]:
        """Return the named splits of all parts, each once."""
        return list(dict.fromkeys(name for names in self.names.values() for name in names))

    def sources(self, part: str) -> list[str]:
        """Return the named splits that the images of a part are from."""
        return self.names["train" if part == "val" and self.val_fraction is not None else part]

    def members(self, part: str, missing_ok: bool = False) -> list[Member]:
        """Return the images of a part, made or listed, without splits that are not there if `missing_ok`."""
        if self.val_fraction is None or part == "test":
            return self.format.list_images(self.names[part], missing_ok)
        if not self._made:
            self._made = self._divide(self.val_fraction)
        return self._made[part]

    def _divide(self, val_fraction: float) -> dict[str, list[Member]]:
        """Return images to train and to validate on: as this run had them before, else made now."""
        images = {member.name: member for member in self._to_divide()}
        lists = read_lists(self.folder, self.made_by) if self.folder is not None else None
        if lists is None:
            self._together = self._near_duplicates(list(images.values()))
            train, val = divide(list(images), val_fraction, self.split_seed, self._together)
            lists = self._new_lists = {"train": train, "val": val}
        gone = [name for names in lists.values() for name in names if name not in images]
        if gone:
            raise InputError(
                f"{self.folder}: {len(gone)} images of this run's splits ({gone[0]}) are not in the dataset"
            )
        return {part: [images[name] for name in names] for part, names in lists.items()}

    def _near_duplicates(self, members: Sequence[Member]) -> list[list[str]]:
        """Return the names of images that show the same, in groups of two or more, found as the doctor finds them."""
        names: dict[ImageFile, list[str]] = {}
        for member, record in zip(members, self.format.read(members, None), strict=True):
            if record.path is not None:
                file = ImageFile(record.path, record.upright, self.format.reading)
                names.setdefault(file, []).append(member.name)
        cache = FingerprintCache(self.format.root, self.format.cache_folder, self.format.reading)
        return [sorted(name for file in group for name in names[file]) for group in cache.groups(list(names))]

    def take_lists(self, folder: Path) -> None:
        """Take the lists that a run keeps in a folder, where they were made by the same values."""
        with suppress(InputError):
            if self.val_fraction is not None and read_lists(folder, self.made_by) is not None:
                self.folder = folder

    def _to_divide(self) -> list[Member]:
        if self.names["train"]:
            return self.format.list_images(self.names["train"])
        return self.format.list_others(self.format.list_images(self.names["test"], missing_ok=True), look=False)

    def leaks(self) -> Leaks:
        """Return the images that are in two parts, none where that is accepted."""
        if self.allow_overlap:
            return Leaks()
        return find_leaks({part: self.members(part, missing_ok=True) for part in self.given})

    def keep(self) -> None:
        """Say how many images are in each list that was made, and write the lists if there is a folder for them."""
        if self._new_lists:
            from pytorch_lightning.utilities import rank_zero_only  # here, because it takes seconds to import

            rank_zero_only(self._keep)(self._new_lists)
            self._new_lists = {}

    def _keep(self, lists: Mapping[str, Sequence[str]]) -> None:
        if self.folder is not None:
            write_lists(self.folder, lists, self.made_by)
        where = f"; the lists are in {self.folder}" if self.folder is not None else ""
        by = ", ".join(f"{key} {value}" for key, value in self.made_by.items())
        alike = ""
        if self._together:
            count, example = sum(map(len, self._together)), " and ".join(self._together[0][:2])
            alike = f"; {count} images that show the same as another ({example}) are in the same list as that"
        print(
            f"splits made by {by}: {len(lists['train'])} images to train and {len(lists['val'])} to validate on"
            f"{alike}{where}",
            file=sys.stderr,
        )


def divide(
    names: Sequence[str], val_fraction: float, seed: int, together: Sequence[Sequence[str]] = ()
) -> tuple[list[str], list[str]]:
    """Return the names to train on and to validate on, each sorted and neither empty.

    Names are ordered by a digest of seed and name, and the first `val_fraction` of them validate. Neither the order of
    the names nor that of the files decides anything, and another image more or less moves few of the others.

    Args:
        names: All names.
        val_fraction: Share that validates.
        seed: Another one divides otherwise.
        together: Groups of names that are in one list; one that is too large to validate trains.

    Raises:
        InputError: There are fewer than two names.
    """
    if len(names) < 2:
        raise InputError(f"--data.val_fraction {val_fraction} needs at least 2 images to divide, there is {len(names)}")

    def drawn(name: str) -> bytes:
        return blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()

    count = min(max(round(len(names) * val_fraction), 1), len(names) - 1)
    ordered = sorted(names, key=drawn)
    group_of = {name: tuple(group) for group in together for name in group}
    groups: list[tuple[str, ...]] = list(dict.fromkeys(group_of.get(name, (name,)) for name in ordered))
    if len(groups) < 2:  # all images show the same
        groups = [(name,) for name in ordered]
    val: list[str] = []
    for group in groups:
        val += group if len(val) + len(group) <= count else ()
    if not val:
        smallest = min(groups, key=len)
        val += smallest
    return sorted(set(names) - set(val)), sorted(val)


def write_lists(folder: Path, lists: Mapping[str, Sequence[str]], made_by: Mapping[str, object]) -> None:
    """Write `<part>.txt` for each list, a name per line, and how they were made.

    Raises:
        InputError: The folder cannot be written to.
    """
    texts = {f"{part}.txt": "".join(f"{name}\n" for name in names) for part, names in lists.items()}
    try:
        for name, text in texts.items():
            write_whole(folder / name, text.encode("utf-8", "surrogateescape"))
        write_json(folder / MADE_BY, made_by)
    except OSError as error:
        raise InputError(f"{folder}: the lists of the made splits cannot be written there ({brief(error)})") from error


def read_lists(folder: Path, made_by: Mapping[str, object]) -> dict[str, list[str]] | None:
    """Return the lists "train" and "val" that a run has used before, or None where there are none.

    Raises:
        InputError: They were made otherwise than `made_by` says, or cannot be read.
    """
    if not (folder / MADE_BY).is_file():
        return None
    try:
        before = json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
        lists = {
            part: (folder / f"{part}.txt").read_bytes().decode("utf-8", "surrogateescape").splitlines()
            for part in ("train", "val")
        }
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the lists of this run's splits cannot be read ({brief(error)})") from error
    changed = [f"{key} {before.get(key)}, now {value}" for key, value in made_by.items() if before.get(key) != value]
    if changed:
        raise InputError(
            f"{folder}: the splits of this run were made with {'; '.join(changed)}: use the same values, or another run"
        )
    return lists


@dataclass(frozen=True)
class Leaks:
    """Images that are in two parts.

    Args:
        summary: The first two such parts, in one line.
        problems: By part the images that a later part has too.
    """

    summary: str = ""
    problems: Mapping[str, Mapping[Member, Problem]] = field(default_factory=dict)


def find_leaks(parts: Mapping[str, Sequence[Member]]) -> Leaks:
    """Return the images that are in two parts, given by what they are for: "train", "val", "test"."""
    folders = {member.folder for members in parts.values() for member in members}
    resolved = {folder: folder.resolve() for folder in folders}
    images = {
        part: {(resolved[member.folder], member.stem): member for member in members} for part, members in parts.items()
    }
    summary = ""
    leaks: dict[str, dict[Member, Problem]] = {}
    for (first, ours), (second, theirs) in itertools.combinations(images.items(), 2):
        shared = [member for key, member in ours.items() if key in theirs]
        for member in shared:
            text = f"{member.source}: names {member.stem}, which --data.{second}_splits name too"
            problem = Problem(str(member.source), None, "leak_by_name", text)
            leaks.setdefault(first, {}).setdefault(member, problem)
        if shared and not summary:
            names = ", ".join(member.stem for member in shared[:3]) + (", ..." if len(shared) > 3 else "")
            summary = (
                f"--data.{first}_splits and --data.{second}_splits share {len(shared)} images ({names}), so numbers "
                f"on {second} would not be those of unseen images; name splits without common images, or accept it by "
                "--data.allow_overlap true"
            )
    return Leaks(summary, leaks)
