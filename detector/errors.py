"""The exceptions that stand for bad input and for a failed training, as opposed to a bug; and how lines name files."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Bad configuration or bad data, in one line that names the file, key or value and says what would be right.

    The command line prints the line on stderr without a traceback and exits with 2.

    Attributes:
        details: further lines, printed below it: a list of which the line names the first entry.
    """

    details: tuple[str, ...] = ()


class TrainingError(RuntimeError):
    """A training that cannot go on, such as one whose loss is not a number, in one line that says where and what helps.

    The command line prints the line on stderr without a traceback and exits with 1.
    """


def printable(name: object) -> str:
    """Return a file name as any terminal shows it, in one line: what is no UTF-8 or not visible becomes an escape."""
    try:
        text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair, which no file name brings along
        text = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(error: BaseException) -> str:
    """Return the message of an error in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(text: str, limit: int = 60) -> str:
    """Return a text in one line that is no longer than `limit`."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Return names in one line, such as "a, b and 3 more"."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def value_text(value: object) -> str:
    """Return the value of an option for a line, with true and false as YAML has them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_choices(section: str, config: Any) -> None:
    """Raise InputError for a field of type `Literal[...]` with another value.

    The command line checks that itself; Python and checkpoints do not.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"{section}.{name}: {value!r} is none of {', '.join(map(str, get_args(hint)))}")


def check_four(key: str, values: Sequence[float]) -> None:
    """Raise InputError unless there is one number for each of dx, dy, dw, dh."""
    if len(values) != 4:
        raise InputError(f"{key}: {values} has {len(values)} numbers, needs 4: of dx, dy, dw, dh")


def check_range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise InputError unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{key}: {value} must be " + (f"in [{low}, {high}]" if high < float("inf") else f">= {low}"))
