"""What can be wrong with a dataset: a fixed set of kinds, what each does to a training, and one `Problem` a finding."""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

Kind = str  # a key of `CONSEQUENCES`

_STOPS = "stops training; --data.on_error skip leaves out this "


class Consequence(NamedTuple):
    """What a kind of problem does to a training, and whether that stops (`--data.on_error raise`)."""

    effect: str
    breaks: bool = False


_IMAGE = Consequence(f"{_STOPS}image", breaks=True)
_OBJECT = Consequence(f"{_STOPS}object", breaks=True)
CONSEQUENCES: Final[dict[Kind, Consequence]] = {
    "missing_image": _IMAGE,
    "unreadable_image": _IMAGE,
    "truncated_image": _IMAGE,
    "dark_images": Consequence("trained on as they are, with most of their contrast lost: 8 bits are kept"),
    "size_mismatch": Consequence("the image's own size counts; boxes are taken as they are and clipped to it"),
    "missing_annotation": _IMAGE,
    "unreadable_annotation": _IMAGE,
    "file_name_mismatch": Consequence("the stated name is not used; the image is found by the name of the XML file"),
    "unknown_size": Consequence("boxes could not be checked against the image"),
    "empty_image": Consequence("trained on as background only"),
    "incomplete_object": _OBJECT,
    "negative_box": _OBJECT,
    "box_outside": _OBJECT,
    "box_partly_outside": Consequence("clipped to the image"),
    "one_pixel_box": Consequence("trained on as it is, though hardly an anchor or a proposal will match it"),
    "duplicate_object": Consequence("trained on twice, and one of the two always counts as missed in an evaluation"),
    "unknown_class": _OBJECT,
    "misspelt_class": _OBJECT,
    "similar_class": Consequence("trained on as a class of its own"),
    "class_without_objects": Consequence("never learned, and its AP is not defined"),
    "unusable_split": Consequence("stops training on this split", breaks=True),
    "named_twice": Consequence("stops training; name the image once", breaks=True),
    "leak_by_name": Consequence(
        "stops training on the one and evaluating on the other; --data.on_error skip leaves the image out of the "
        "split that is trained on, --data.allow_overlap true accepts it",
        breaks=True,
    ),
    "not_in_split": Consequence("not used"),
    "leak_by_content": Consequence("used in both, so numbers on the second are not those of unseen images"),
    "duplicate_image": Consequence("used twice"),
}


KINDS: Final = tuple(CONSEQUENCES)


@dataclass(frozen=True)
class Problem:
    """One finding.

    Args:
        file: the file that is to be mended.
        object: index of the object in its annotation, from 0; None for what concerns the whole file.
        kind: one of `KINDS`.
        message: what is wrong, in one line that names the file.
        used: False for files that no split names: nothing in them can break a training.
    """

    file: str
    object: int | None
    kind: Kind
    message: str
    used: bool = True

    @property
    def breaks(self) -> bool:
        """Return whether it would stop a training."""
        return self.used and CONSEQUENCES[self.kind].breaks

    @property
    def effect(self) -> str:
        """Return what happens to it in training."""
        consequence = CONSEQUENCES[self.kind]
        return "not used: no split names the image" if consequence.breaks and not self.used else consequence.effect

    @property
    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "file": self.file,
            "object": self.object,
            "kind": self.kind,
            "effect": self.effect,
            "breaks_training": self.breaks,
            "message": self.message,
        }
