"""Why no classes are found in a dataset whose classes are to be those of its annotations: the first true cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datamodules.voc.format import Annotation
from datamodules.voc.names import annotated_names, annotation_path, read_split_lines
from detector.errors import InputError, listed


def no_classes(
    folder: Path, split_files: Sequence[Path], annotations: Mapping[str, Annotation | InputError]
) -> InputError:
    """The error to raise where no annotation names an object.

    Args:
        folder: the dataset folder.
        split_files: those whose images the annotations are of; none: all annotations of the folder.
        annotations: by name, each read or the reason why it was not.
    """
    there = [f"{name}.xml" for name in annotated_names(folder)]
    for path in split_files:
        for line in read_split_lines(path):
            if not annotation_path(folder, line.name).is_file():
                shown = line.text if len(line.text) <= 60 else line.text[:57] + "..."
                return InputError(
                    f"{path}: line {line.number} is {shown!r}, but there is no {annotation_path(folder, line.name)}; "
                    f"{folder / 'Annotations'} holds {listed(there, 3) or 'no XML file'}"
                )
            found = annotations.get(line.name)
            if isinstance(found, InputError):
                return found
    if not there:
        return InputError(f"{folder / 'Annotations'}: holds no XML file, so there are no images to train on")
    bad = next((one for one in annotations.values() if isinstance(one, InputError)), None)
    where = "of the splits " if split_files else ""
    return bad or InputError(f"{folder}: no annotation {where}names an object, so there are no classes")
