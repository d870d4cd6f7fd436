"""Fetching the PASCAL VOC archives."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from torchvision.datasets.utils import check_integrity, extract_archive

from detector.errors import InputError, brief
from detector.training.progress_line import ProgressLine, rate, time_left

CHUNK = 1 << 20  # bytes
TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """One archive of the VOC servers.

    Args:
        file_name: name of the tar file.
        url: where it is.
        size: bytes.
        md5: checksum.
    """

    file_name: str
    url: str
    size: int
    md5: str


def _archive(year: str, file_name: str, size: int, md5: str) -> Archive:
    return Archive(file_name, f"https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{file_name}", size, md5)


ARCHIVES: Final = {
    ("2007", "trainval"): _archive(
        "2007", "VOCtrainval_06-Nov-2007.tar", 460_032_000, "c52e279531787c972589f7e41ab4ae64"
    ),
    ("2007", "test"): _archive("2007", "VOCtest_06-Nov-2007.tar", 451_020_800, "b6e924de25625d8de591ea690078ad9f"),
    ("2012", "trainval"): _archive(
        "2012", "VOCtrainval_11-May-2012.tar", 1_999_639_040, "6cd6e144f989b92b3379bac3b3de84fd"
    ),
}


def archive_for(year: str, split: str) -> Archive:
    """Return the archive that holds a split.

    Args:
        year: e.g. "2007".
        split: e.g. "trainval" or the class split "cat_test".

    Raises:
        InputError: if no public archive holds it.
    """
    archive = find_archive(year, split)
    if archive is None:
        there = ", ".join(f"{y}_{p}" for y, p in ARCHIVES)
        raise InputError(f"no download is known for the split {year}_{split}; there are {there} and their parts")
    return archive


def find_archive(year: str, split: str) -> Archive | None:
    """Return the archive that holds a split, or None if no public archive does."""
    return ARCHIVES.get((year, "test" if "test" in split.split("_") else "trainval"))


def download_voc(root: str | Path, archives: Iterable[Archive]) -> None:
    """Download, check and unpack archives under `root`, which then holds `VOCdevkit/VOC<year>/`.

    Says first, on stderr, how much there is to download. Where a connection broke is gone on from what it has left
    (`<archive>.part`), also by a later call; an archive already lying in `root` is only checked and unpacked.

    Raises:
        InputError: too little space, a download or an archive that fails, with the URL and what to do.
    """
    root = Path(root)
    wanted = list(dict.fromkeys(archives))
    missing = [archive for archive in wanted if not (root / archive.file_name).is_file()]
    _announce(root, wanted, missing)
    for archive in wanted:
        try:
            root.mkdir(parents=True, exist_ok=True)
            if archive in missing:
                _fetch(archive, root)
            if not check_integrity(str(root / archive.file_name), archive.md5):
                raise InputError(_wrong_checksum(archive, root, archive in missing))
            _mark(archive, root).touch()
            extract_archive(str(root / archive.file_name), str(root))
            _mark(archive, root).unlink()
        except InputError:
            raise
        except Exception as error:  # urllib, sockets, tarfile: whatever it is, the way out is the same
            raise InputError(
                f"could not fetch {archive.url} ({brief(error)}); run again to go on, or download it by hand, put the "
                f"file {archive.file_name} in {root} and run again"
            ) from error


def is_half_unpacked(root: Path, archive: Archive) -> bool:
    """Return whether unpacking an archive was cut off, which may leave split files without their images."""
    return _mark(archive, root).is_file()


def _mark(archive: Archive, root: Path) -> Path:
    return root / f"{archive.file_name}.unpacking"


def _announce(root: Path, wanted: Sequence[Archive], missing: Sequence[Archive]) -> None:
    total = sum(archive.size for archive in missing)
    there = sum(min(_part_size(archive, root), archive.size) for archive in missing)
    names = ", ".join(archive.file_name for archive in wanted)
    before = f", {there / 1e9:.2f} GB of it are there already" if there else ""
    print(f"VOC archives for {root}: {names}; {total / 1e9:.2f} GB to download{before}", file=sys.stderr)
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    needed, free = total - there + sum(archive.size for archive in wanted), shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{root}: the archives and what is in them need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
        )


def _wrong_checksum(archive: Archive, root: Path, fetched: bool) -> str:
    path = root / archive.file_name
    if fetched:
        path.unlink()
        return f"{archive.url}: what came has not the checksum {archive.md5} (md5) and was deleted; run again"
    return f"{path}: has not the checksum {archive.md5} (md5) of {archive.url}; delete the file and run again"


def _part_size(archive: Archive, root: Path) -> int:
    part = root / f"{archive.file_name}.part"
    return part.stat().st_size if part.is_file() else 0


def _fetch(archive: Archive, root: Path) -> None:
    """Download an archive, going on where an earlier try ended, as long as each try brings something."""
    part = root / f"{archive.file_name}.part"
    with contextlib.closing(ProgressLine(sys.stderr)) as line:
        while True:
            before = _part_size(archive, root)
            try:
                whole = _fetch_rest(archive, part, line)
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) or _part_size(archive, root) <= before:
                    raise
                continue
            if whole:
                break
            if _part_size(archive, root) <= before:
                raise OSError(f"the connection ended after {before} of {archive.size} bytes")
    part.replace(root / archive.file_name)


def _fetch_rest(archive: Archive, part: Path, line: ProgressLine) -> bool:
    """Ask once for what is missing; return whether all is there afterwards."""
    start = part.stat().st_size if part.is_file() else 0
    request = Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing lies beyond what is there: it is whole, or it is no part of this file; the checksum will tell.
        return True
    with response:
        if start and response.status != 206:  # the server sends the whole file, whatever was asked for
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else archive.size
        with part.open("ab" if start else "wb") as file:
            done, began = start, time.monotonic()
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if line.due():
                    seconds = time.monotonic() - began
                    parts = [f"{archive.file_name} {done / 1e6:.0f}/{total / 1e6:.0f} MB"]
                    parts += [time_left(seconds, done - start, total - start)]
                    line.show([*parts, f"{rate((done - start) / 1e6 / seconds)} MB/s"], done / total)
    return done >= total
