"""The exceptions that stand for bad input and for a failed training, as opposed to a bug; and how lines name files."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from math import inf
from typing import Any, Literal, get_args, get_origin, get_type_hints

LONGEST = 1000
"""Characters that are shown at both ends of a line."""
type_hints = cache(get_type_hints)
"""Returns the hints of a class, looked up once: a search for anchors builds configs by the thousand."""


class InputError(ValueError):
    """Bad configuration or bad data, in one line that names the file, key or value and says what would be right.

    The command line prints the line on stderr without a traceback and exits with 2.

    Attributes:
        details: further lines, printed below it: a list of which the line names the first entry.
    """

    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the line, without its middle where a value in it is endless."""
        text = super().__str__()
        return text if len(text) <= 2 * LONGEST else f"{text[:LONGEST]} ... {text[-LONGEST:]}"


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


def one_line(error: BaseException) -> str:
    """Return the message of bad input or a failed training; one from a data worker comes in the worker's traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = re.split("InputError: |TrainingError: ", text)[-1]
    return re.sub(r"\s*\n\s*", " ", text.strip())


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


def flat_options(config: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return nested options as one level, with `a.b` keys as on the command line."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        flat |= flat_options(value, separator, f"{prefix}{key}{separator}") if nested else {f"{prefix}{key}": value}
    return flat


def shown_options(config: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return `flat_options` with the class path of a part as the value of its option, and its arguments beside it.

    So `roi.reg_loss` is a column of all runs: giou of one, my_package.Wing of another, which has `roi.reg_loss.omega`.
    """
    path, arguments = f"{separator}class_path", f"{separator}init_args"
    return {
        key.removesuffix(path).replace(f"{arguments}{separator}", separator): value
        for key, value in flat_options(config, separator).items()
        if not key.endswith(arguments)
    }


def check_choices(section: str, config: Any) -> None:
    """Raise InputError for a field of type `Literal[...]`, or of that or bool or a list, with another value.

    The command line checks that itself; Python and checkpoints do not.
    """
    for name, hint in type_hints(config.__class__).items():
        value, kinds = getattr(config, name), (hint,) if get_origin(hint) is Literal else get_args(hint)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        others = tuple(get_origin(kind) or kind for kind in kinds if get_origin(kind) is not Literal)
        if choices and value not in choices and not isinstance(value, others):
            texts = ["true", "false"] * (bool in others) + list(map(str, choices)) + ["a list"] * (list in others)
            raise InputError(f"{section}.{name}: {value!r} is none of {', '.join(texts)}")


def check_numbers(section: str, config: Any, allowed: Mapping[str, str]) -> None:
    """Raise InputError for a number of a field, or in its list, that is out of its interval; None is not looked at.

    `allowed` gives the names of the fields by interval, such as "[0, 1)" or "[1, inf]".
    """
    for interval, names in allowed.items():
        low, high = map(float, interval[1:-1].split(","))
        for name in names.split():
            value = getattr(config, name)
            for number in value if isinstance(value, list) else () if value is None else (value,):
                inside = low < number < high or (number == low and interval[0] == "[")
                if not (inside or (number == high and interval[-1] == "]")):
                    least = "positive" if interval[0] == "(" else f">= {low:g}"
                    raise InputError(f"{section}.{name}: {value} must be {f'in {interval}' if high < inf else least}")
