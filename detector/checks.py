"""Checks that all config dataclasses share: choices by name, numbers of numbers."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from detector.errors import InputError


def check_choices(section: str, config: Any) -> None:
    """Raises InputError for a field of type `Literal[...]` with another value; the command line checks that itself,
    Python and checkpoints do not."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"{section}.{name}: {value!r} is none of {', '.join(map(str, get_args(hint)))}")


def check_four(key: str, values: Sequence[float]) -> None:
    """Raises InputError unless there is one number for each of dx, dy, dw, dh."""
    if len(values) != 4:
        raise InputError(f"{key}: {values} has {len(values)} numbers, needs 4: of dx, dy, dw, dh")


def check_range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises InputError unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{key}: {value} must be " + (f"in [{low}, {high}]" if high < float("inf") else f">= {low}"))
