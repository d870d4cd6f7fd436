"""What a training does about bad data: `--data.on_error raise` stops with all of it, `skip` goes on without it.

What is looked for before the first step: everything in annotations, missing images, headers of images, and images that
are cut short. Damage inside an image shows only when it is decoded: `raise` stops then, and under `skip` the next image
of the split that can be decoded takes its place (`NextImageInstead`). That depends on nothing but the files, so it is
the same on all ranks and in all workers, and when a run is resumed; an evaluation counts images by their numbers, so it
leaves the undecodable one out.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.dataset_format import DatasetFormat, ImageRecord, Member
from datamodules.detection_dataset import DetectionDataset, Target
from datamodules.problems import Problem
from datamodules.splits import Leaks
from detector.errors import InputError
from detector.files import write_json
from detector.use.reading import Reading, read_image

OnError = Literal["raise", "skip"]
SHOWN: Final = 20  # problems in a message
DOCTOR: Final = "frcnn doctor --format json lists all"


def read_usable(
    format: DatasetFormat,
    class_names: Sequence[str],
    parts: Mapping[str, Sequence[Member]],
    leaks: Leaks,
    on_error: OnError,
    look_for_cut_images: bool,
    report: Path | None,
) -> dict[str, list[ImageRecord]]:
    """Return the usable images by part, with their usable objects; stop because of problems, or say what is skipped.

    `leaks` may be of other parts than those that are read; the list of what is skipped goes into `report`, if given.

    Raises:
        InputError: There is something to stop for: the message names the first problem and the number of other files,
            the details list all. Or nothing is left of a part.
    """
    skip = on_error == "skip"
    counted = [found for part, found in leaks.problems.items() if part in parts or not skip]
    problems = [problem for found in counted for problem in found.values()]
    records: dict[str, list[ImageRecord]] = {}
    for part, members in parts.items():
        leaked = leaks.problems.get(part, {}) if skip else {}
        wanted = [member for member in members if member not in leaked]
        found: dict[Path | None, ImageRecord] = {}
        for member, record in zip(wanted, format.read(wanted, class_names), strict=True):
            problems += record.problems
            if record.usable and found.setdefault(record.path, record) is not record:
                text = f"{member.source}: names {record.name}, which another of the splits names too"
                problems.append(Problem(str(member.source), None, "named_twice", text))
        records[part] = list(found.values())
        if look_for_cut_images:
            cut = {problem.file: problem for problem in find_cut_images(records[part], format.reading)}
            records[part] = [record for record in records[part] if str(record.path) not in cut]
            problems += cut.values()
    broken = [problem for problem in problems if problem.breaks]
    if broken and not skip:
        raise refusal(broken, leaks.summary or broken[0].message)
    for part, left in records.items():
        if parts[part] and not left:
            raise refusal(broken, f"--data.on_error skip would leave no image of the {part} splits")
    if broken:
        images = sum(map(len, parts.values())) - sum(map(len, records.values()))
        _say_what_is_skipped(broken, images, report)
    return records


def refusal(broken: Sequence[Problem], first: str) -> InputError:
    """Return the error that stops a training because of problems; `first` is what stands in its one line."""
    files = len({problem.file for problem in broken} - {broken[0].file})
    more = f" (and {files} more files with problems)" if files else ""
    error = InputError(f"{first}{more}")
    lines = [f"{problem.kind}: {problem.message}" for problem in broken[:SHOWN]]
    if len(broken) > SHOWN:
        lines.append(f"... and {len(broken) - SHOWN} more; {DOCTOR}")  # in no file: there will be no run
    if len(broken) > 1:
        advice = "--data.on_error skip leaves out what is broken; frcnn doctor says more about the dataset"
        error.details = (*lines, advice)
    return error


def ends_properly(image: Path) -> bool:
    """Return whether a JPEG or PNG file has its end mark; False for other formats, which only decoding can judge."""
    with image.open("rb") as file:
        start = file.read(8)
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 64))
        end = file.read()
    if start[:2] == b"\xff\xd8":
        return end.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    return start == b"\x89PNG\r\n\x1a\n" and b"IEND\xaeB`\x82" in end


def find_cut_images(records: Iterable[ImageRecord], reading: Reading) -> list[Problem]:
    """Find the images that are cut short: those without their format's end mark that cannot be decoded either."""
    found: list[Problem] = []
    for record in records:
        try:
            if record.path is not None and not ends_properly(record.path):
                read_image(record.path, record.upright, reading)
        except (InputError, OSError) as error:
            found.append(Problem(str(record.path), None, "truncated_image", str(error)))
    return found


@rank_zero_only
def _say_what_is_skipped(broken: Sequence[Problem], images: int, report: Path | None) -> None:
    objects = {(problem.file, problem.object) for problem in broken if problem.object is not None}
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(problem.kind for problem in broken).items())
    if report is not None:
        try:
            write_json(report, [problem.document for problem in broken])
        except OSError as error:
            raise InputError(f"{report}: the list of bad data cannot be written ({error.strerror})") from error
    where = DOCTOR if report is None else f"the list is in {report}"
    text = f"leaves out {images} images and {len(objects)} objects ({kinds}); {where}"
    print(f"--data.on_error skip: {text}", file=sys.stderr)


class NextImageInstead(Dataset[tuple[Tensor, Target]]):
    """A dataset in which the next decodable image takes the place of one that cannot be decoded.

    Args:
        dataset: raises `InputError` for samples whose image cannot be decoded.
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset
        self.file_names = dataset.file_names
        self.image_ids = dataset.image_ids
        self.category_ids = dataset.category_ids
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Return the sample, or the next one that can be decoded; raise InputError if none can."""
        epoch, first = key if isinstance(key, tuple) else (0, key)
        for index in (*range(first, len(self)), *range(first)):
            try:
                return self.dataset[epoch, index]
            except InputError as error:
                if index not in self._told:
                    self._told.add(index)
                    print(f"--data.on_error skip: {error}; the next image takes its place", file=sys.stderr)
        raise InputError("--data.on_error skip: not one image of the split can be decoded")
