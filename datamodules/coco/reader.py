"""CocoFormat: the images and annotations of a dataset in COCO's JSON format, found, read and judged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path
from typing import ClassVar, Final

from datamodules.checks import judge
from datamodules.coco.format import CocoFile, NoAnnotationsError, id_order, read_coco
from datamodules.dataset_format import DatasetFormat, Id, ImageRecord, Member, Stated
from datamodules.problems import Problem
from detector.errors import InputError, listed
from detector.use.reading import SUFFIXES, USUAL, Reading

PLACES: Final = ("annotations/{}.json", "annotations/instances_{}.json", "{}.json", "{}/_annotations.coco.json")


class CocoFormat(DatasetFormat):
    """A dataset in COCO's JSON format, whose splits are annotation files.

    Args:
        root: As `--data.root`.
        reading: How image files are read.
        image_dirs: As `--data.image_dirs`.
    """

    name = "coco"
    needs_splits = "file"
    own_annotations: ClassVar[bool] = True

    def __init__(self, root: str | Path, reading: Reading = USUAL, image_dirs: Sequence[str] | None = None) -> None:
        super().__init__(root, reading)
        self.image_dirs = image_dirs
        self._files: dict[Path, CocoFile] = {}

    def class_names(self, splits: Sequence[str], everything: bool = False) -> list[str]:
        """Return the categories of files by ascending id, without one that only names the group of the others."""
        files = [self._file(path) for path in map(self.split_file, dict.fromkeys(splits))]
        used = {(category.id, category.name) for file in files for category in file.categories}
        found: dict[str, None] = {}
        for file in files:
            root = [] if file.root is None or (file.root.id, file.root.name) not in used else [file.root]
            if file.root is not None and not root:
                self.say(
                    f"{file.path}: the category {file.root.name!r} (id {file.root.id}) is left out: it only names the "
                    "supercategory of the others, and has no objects"
                )
            found |= dict.fromkeys(category.name for category in sorted([*file.categories, *root], key=id_order))
        if not found:
            raise InputError(f"{files[0].path}: names no categories, so there are no classes")
        return list(found)

    def known_classes(self, splits: Sequence[str]) -> Sequence[str] | None:
        """Return the categories of files."""
        return self.class_names(splits) if splits else None

    def split_file(self, split: str) -> Path:
        """Return the annotation file that a path or a short name means; raise InputError where there is none."""
        path = self._find(split)
        if path is not None:
            return path
        there = listed(self._json_files()) or "no JSON file"
        text = f"{self.root / split}: no such annotation file; {self.root} holds {there}"
        raise InputError(f"{text}{self.other_format()}")

    def _find(self, split: str) -> Path | None:
        candidates = [self.root / split, *(self.root / place.format(split) for place in PLACES)]
        return next(filter(Path.is_file, candidates), None)

    def _json_files(self) -> list[str]:
        there = [*self.root.glob("*.json"), *self.root.glob("*/*.json")]
        return sorted(path.relative_to(self.root).as_posix() for path in there)

    def offered(self) -> list[str] | None:
        """Return the annotation files of the dataset, by their short names where these mean them; None if none."""
        names = [name for name in self._json_files() if _looks_like_annotations(self.root / name)]
        short = {name: _short_name(self.root / name) for name in names}
        return [short[name] if self._find(short[name]) == self.root / name else name for name in names] or None

    def _file(self, path: Path) -> CocoFile:
        if path not in self._files:
            self._files[path] = read_coco(path)
            for note in self._files[path].notes:
                self.say(note)
        return self._files[path]

    def list_images(self, splits: Sequence[str], missing_ok: bool = False, repeats: bool = False) -> list[Member]:
        """Return the images of annotation files, in order."""
        paths = []
        for name in splits:
            try:
                paths.append(self.split_file(name))
            except InputError:
                if not missing_ok:
                    raise
        members: list[Member] = []
        for path in paths:
            prefix = f"{_short_name(path)}/" if len(paths) > 1 else ""  # files may hold equal names of different images
            folders = self._image_folders(path)
            for name in self._file(path).images:
                # Nearly always the folder of the image before.
                folder = next((folder for folder in folders if os.path.isfile(folder / name)), folders[0])
                folders.insert(0, folders.pop(folders.index(folder)))
                members.append(Member(prefix + name, folder, name, path))
        return members

    def _image_folders(self, path: Path) -> list[Path]:
        if self.image_dirs is not None:
            if not self.image_dirs:
                raise InputError("--data.image_dirs is empty; name at least one folder, or leave the option out")
            return [self.root / folder for folder in self.image_dirs]
        split = _short_name(path)
        return [path.parent, self.root / split, self.root / "images" / split, self.root / "images", self.root]

    def read(
        self, members: Sequence[Member], class_names: Sequence[str] | None, look: bool = True
    ) -> list[ImageRecord]:
        """Read and judge annotations and the headers of images."""
        paths = [member.folder / member.stem for member in members]
        there = {path for path in paths if os.path.isfile(path)} if look else set()
        headers = self.cache(self.root).headers(path for path in paths if path in there)
        records: list[ImageRecord] = []
        for source, group in groupby(zip(members, paths, strict=True), key=lambda pair: pair[0].source):
            for member, path in group:
                stated = self._stated(member)
                if look and stated.objects is not None and path not in there:
                    text = f"{path}: no such image, but {source} names it (--data.image_dirs)"
                    stated.problems.append(Problem(str(path), None, "missing_image", text))
                found = path if path in there else None
                records.append(judge(stated, member.stem, found, headers.get(path), class_names))
        return records

    def _stated(self, member: Member) -> Stated:
        if member.source.is_dir():  # of no file
            return Stated(member.source, "", annotated=False)
        found = self._file(member.source).images[member.stem]
        return replace(found, problems=list(found.problems))

    def image_names(self, members: Sequence[Member]) -> tuple[str, ...]:
        """Return the file names without suffix, and without folders where they are distinct so."""
        bare = tuple(member.stem.rsplit("/", 1)[-1].rsplit(".", 1)[0] for member in members)
        return bare if len(set(bare)) == len(bare) else tuple(member.stem for member in members)

    def category_ids(self, splits: Sequence[str], class_names: Sequence[str]) -> list[Id] | None:
        """Return the ids of the categories; None where files contradict each other."""
        files = [self._file(self.split_file(name)) for name in splits]
        ids: dict[str, Id] = {}
        for file in files:
            root = () if file.root is None else (file.root,)
            for category in (*file.categories, *root):
                ids.setdefault(category.name, category.id)
        images = [image.result_id for file in files for image in file.images.values()]
        contradict = any(ids[category.name] != category.id for file in files for category in file.categories)
        if len(files) > 1 and (contradict or len(set(images)) < len(images)):
            self.say(
                f"the files {', '.join(splits)} give one id to different images, or one category different ids: "
                "results number images and classes by themselves"
            )
            return None
        free = count(1 + max((number for number in ids.values() if isinstance(number, int)), default=0))
        return [ids[name] if name in ids else next(free) for name in class_names]

    def all_splits(self) -> list[str]:
        """Return the annotation files of the dataset, those that turn out to be none left out."""
        names = []
        for name in self.offered() or []:
            try:
                self._file(self.split_file(name))
            except NoAnnotationsError:
                continue
            except InputError:
                pass  # damaged, which is the doctor's to say
            names.append(name)
        return names

    def list_others(self, members: Iterable[Member], look: bool) -> list[Member]:
        """Return the images beside those of `members` that no file names."""
        paths = {member.folder / member.stem for member in members} if look else set()
        folders = sorted({path.parent for path in paths if os.path.isfile(path)})
        return [
            Member(path.name, folder, path.name, folder)
            for folder in folders
            for path in sorted(folder.iterdir())
            if path.suffix.lower().removeprefix(".") in SUFFIXES and path not in paths and path.name[0] != "."
        ]

    def empty_folders(self, members: Iterable[Member]) -> list[Path]:
        """Return the root if not one of the images is there."""
        return [] if any(os.path.isfile(member.folder / member.stem) for member in members) else [self.root]

    def forget(self) -> None:
        """Free what was only needed for reading."""
        super().forget()
        self._files = {}


def _looks_like_annotations(path: Path) -> bool:
    """Return whether the first and the last bytes of a file are those of COCO annotations."""
    try:
        with path.open("rb") as file:
            start = file.read(2**16)
            file.seek(max(len(start), file.seek(0, 2) - 2**16))
            text = (start + file.read()).replace(b"\0", b"")  # UTF-16 too
    except OSError:
        return False
    return b"{" in start[:8] and any(f'"{key}"'.encode() in text for key in ("images", "annotations", "bbox"))


def _short_name(path: Path) -> str:
    return path.parent.name if path.name == "_annotations.coco.json" else path.stem.removeprefix("instances_")
