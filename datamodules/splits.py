"""Training and validation splits made with a seed, and images that are in two splits."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Final

from datamodules.problems import Problem
from detector.errors import InputError, brief
from detector.files import write_json, write_whole

MADE_BY: Final = "made_by.json"  # written last: where it is, the lists beside it are whole


@dataclass(frozen=True)
class Member:
    """An image as a split names it.

    Args:
        name: its name within the dataset, as lists of made splits hold it.
        folder: the dataset's (VOC) or the image's (COCO).
        stem: the image within the folder.
        source: the file that names it.
    """

    name: str
    folder: Path
    stem: str
    source: Path


def divide(names: Sequence[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Names -> (training, validation), each sorted; at least one name in both.

    Names are ordered by a digest of seed and name, and the first `val_fraction` of them validate. Neither the order of
    the names nor that of the files decides anything, and another image more or less moves few of the others.

    Raises:
        InputError: for fewer than two names.
    """
    if len(names) < 2:
        raise InputError(f"--data.val_fraction {val_fraction} needs at least 2 images to divide, there is {len(names)}")

    def drawn(name: str) -> bytes:
        return blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()

    count = min(max(round(len(names) * val_fraction), 1), len(names) - 1)
    ordered = sorted(names, key=drawn)
    return sorted(ordered[count:]), sorted(ordered[:count])


def write_lists(folder: Path, lists: Mapping[str, Sequence[str]], made_by: Mapping[str, object]) -> None:
    """Write `<part>.txt` for each list, a name per line, and how they were made.

    Raises:
        InputError: if the folder cannot be written to.
    """
    texts = {f"{part}.txt": "".join(f"{name}\n" for name in names) for part, names in lists.items()}
    try:
        for name, text in texts.items():
            write_whole(folder / name, text.encode("utf-8", "surrogateescape"))
        write_json(folder / MADE_BY, made_by)
    except OSError as error:
        raise InputError(f"{folder}: the lists of the made splits cannot be written there ({brief(error)})") from error


def keep_lists(folder: Path | None, lists: Mapping[str, Sequence[str]], made_by: Mapping[str, object]) -> None:
    """Say how many images are in each list, and write the lists if there is a folder for them, on one process."""
    from pytorch_lightning.utilities import rank_zero_only  # here, because it takes seconds to import

    rank_zero_only(_keep_lists)(folder, lists, made_by)


def _keep_lists(folder: Path | None, lists: Mapping[str, Sequence[str]], made_by: Mapping[str, object]) -> None:
    if folder is not None:
        write_lists(folder, lists, made_by)
    where = f"; the lists are in {folder}" if folder is not None else ""
    by = ", ".join(f"{key} {value}" for key, value in made_by.items())
    print(
        f"splits made by {by}: {len(lists['train'])} images to train and {len(lists['val'])} to validate on{where}",
        file=sys.stderr,
    )


def read_lists(folder: Path, made_by: Mapping[str, object]) -> dict[str, list[str]] | None:
    """The lists "train" and "val" that a run has used before, or None where there are none.

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


def check_overlap(parts: Mapping[str, Sequence[Member]]) -> None:
    """Check that no image is in two parts.

    Args:
        parts: Images by what they are for: "train", "val", "test".

    Raises:
        InputError: Names two parts, how many images they share, and the first of these.
    """
    for first, second, shared in overlaps(parts):
        names = ", ".join(member.stem for member in shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise InputError(
            f"--data.{first}_splits and --data.{second}_splits share {len(shared)} images ({names}), so numbers "
            f"on {second} would not be those of unseen images; name splits without common images, or accept it by "
            "--data.allow_overlap true"
        )


def overlaps(parts: Mapping[str, Sequence[Member]]) -> Iterator[tuple[str, str, list[Member]]]:
    """Pairs of parts that share images, with these images as the first of the two names them."""
    folders = {member.folder for members in parts.values() for member in members}
    resolved = {folder: folder.resolve() for folder in folders}
    images = {
        part: {(resolved[member.folder], member.stem): member for member in members} for part, members in parts.items()
    }
    for (first, ours), (second, theirs) in itertools.combinations(images.items(), 2):
        shared = [member for key, member in ours.items() if key in theirs]
        if shared:
            yield first, second, shared


@dataclass(frozen=True)
class Leaks:
    """Images that are in two of the parts "train", "val" and "test".

    Args:
        summary: the first two such parts, in one line.
        problems: by part the images that a later part has too.
    """

    summary: str = ""
    problems: Mapping[str, Mapping[Member, Problem]] = field(default_factory=dict)


def find_leaks(parts: Mapping[str, Sequence[Member]]) -> Leaks:
    """Images that are in two parts.

    Args:
        parts: images by what they are for: "train", "val", "test".
    """
    summary = ""
    try:
        check_overlap(parts)
    except InputError as error:
        summary = str(error)
    leaks: dict[str, dict[Member, Problem]] = {}
    for first, second, shared in overlaps(parts):
        for member in shared:
            text = f"{member.source}: names {member.stem}, which --data.{second}_splits name too"
            problem = Problem(str(member.source), None, "leak_by_name", text)
            leaks.setdefault(first, {}).setdefault(member, problem)
    return Leaks(summary, leaks)
