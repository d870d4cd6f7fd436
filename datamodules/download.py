"""Fetching the PASCAL VOC archives."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

from detector.errors import InputError


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


_HOST = "https://thor.robots.ox.ac.uk/pascal/VOC"
ARCHIVES: dict[tuple[str, str], Archive] = {
    ("2007", "trainval"): Archive(
        "VOCtrainval_06-Nov-2007.tar",
        f"{_HOST}/voc2007/VOCtrainval_06-Nov-2007.tar",
        460_032_000,
        "c52e279531787c972589f7e41ab4ae64",
    ),
    ("2007", "test"): Archive(
        "VOCtest_06-Nov-2007.tar",
        f"{_HOST}/voc2007/VOCtest_06-Nov-2007.tar",
        451_020_800,
        "b6e924de25625d8de591ea690078ad9f",
    ),
    ("2012", "trainval"): Archive(
        "VOCtrainval_11-May-2012.tar",
        f"{_HOST}/voc2012/VOCtrainval_11-May-2012.tar",
        1_999_639_040,
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
}


def archive_for(year: str, split: str) -> Archive:
    """The archive that holds a split.

    Args:
        year: e.g. "2007".
        split: e.g. "trainval" or the class split "cat_test".

    Raises:
        InputError: if no public archive holds it.
    """
    part = "test" if "test" in split.split("_") else "trainval"
    if (year, part) not in ARCHIVES:
        there = ", ".join(f"{y}_{p}" for y, p in ARCHIVES)
        raise InputError(f"no download is known for the split {year}_{split}; there are {there} and their parts")
    return ARCHIVES[year, part]


def download_voc(root: str | Path, archives: Iterable[Archive]) -> None:
    """Download, check and unpack archives under `root`, which then holds `VOCdevkit/VOC<year>/`.

    An archive already lying in `root` is only unpacked. Says on stderr how much will be downloaded.

    Raises:
        InputError: when a download or an archive fails, with the URL and where a file fetched by hand has to go.
    """
    root = Path(root)
    wanted = list(dict.fromkeys(archives))
    total = sum(archive.size for archive in wanted if not (root / archive.file_name).is_file())
    names = ", ".join(archive.file_name for archive in wanted)
    print(f"VOC archives for {root}: {names}; {total / 1e9:.2f} GB to download", file=sys.stderr)
    for archive in wanted:
        try:
            root.mkdir(parents=True, exist_ok=True)
            download_and_extract_archive(
                archive.url, download_root=str(root), filename=archive.file_name, md5=archive.md5
            )
        except Exception as error:  # urllib, sockets, tarfile, checksums: whatever it is, the way out is the same
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"could not fetch {archive.url} ({reason}); download it by hand, put the file "
                f"{archive.file_name} in {root} and run again"
            ) from error
