"""Parts of one's own: what an option takes beside the names of ours, by class path, such as my_package.MyLoss.

An option such as `roi.reg_loss` has the type `Literal["smooth_l1", ...] | BoxLoss`: a short name, which a table beside
the base class turns into one of our classes, or an object of a class of one's own. In YAML, on the command line and in
checkpoints that is its class path with its arguments.
"""

from abc import ABC
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import isabstract, signature
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from detector.errors import InputError, brief, check_choices

P = TypeVar("P", bound="Part")


class Part(ABC):  # noqa: B024
    """The base of the base classes of all parts.

    A part of one's own is a dataclass that inherits from one of these, such as `BoxLoss`, or another class that keeps
    each argument of its constructor under the argument's name: so a checkpoint can tell how it was made. What is to be
    kept in checkpoints beside, such as statistics of a training, is a buffer of a class that is an `nn.Module`, too.
    """

    def as_text(self) -> dict[str, Any]:
        """Return the class path and the arguments, which make an equal one.

        Raises:
            InputError: It does not keep its arguments.
        """
        kind = type(self)
        path = f"{kind.__module__}.{kind.__qualname__}"
        for name in (names := signature(kind).parameters):
            if not hasattr(self, name):
                raise InputError(f"{path}: must keep its argument {name} as self.{name}, for checkpoints")
        return {"class_path": path, "init_args": {name: _as_text(getattr(self, name)) for name in names}}


def options_of(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain values, of which parts are class paths and arguments."""
    return {field.name: _as_text(getattr(config, field.name)) for field in fields(config)}


def _as_text(value: Any) -> Any:
    if isinstance(value, Part):
        return value.as_text()
    if is_dataclass(value):
        return options_of(value)
    if isinstance(value, Mapping):
        return {key: _as_text(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_as_text, value))
    return str(value) if isinstance(value, Path) else value


def settle(section: str, config: Any) -> None:
    """Make the parts that a config has as text, and refuse values that are no choices of its fields.

    Raises:
        InputError: A class is not there, is of another kind or refuses its arguments; or as `check_choices`.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        for kind in get_args(hint):
            as_text = isinstance(value, Mapping) or (isinstance(value, str) and "." in value)
            if as_text and isinstance(kind, type) and issubclass(kind, Part):
                setattr(config, name, made(f"{section}.{name}", value, kind))
    check_choices(section, config)


def made(where: str, text: str | Mapping[str, Any], base: type[P]) -> P:
    """Return the part that a class path names, with its arguments where there are some.

    Args:
        where: The option, for messages.
        text: The class path, or a mapping of `class_path` and `init_args`.
        base: What it has to inherit from.

    Raises:
        InputError: The class is not there, is of another kind or refuses its arguments.
    """
    given: Mapping[str, Any] = {"class_path": text} if isinstance(text, str) else text
    path, arguments = str(given.get("class_path", "")), given.get("init_args") or {}
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        missing = isinstance(error, ModuleNotFoundError) and "; install the package that has it"
        raise InputError(f"{where} {path}: {brief(error)}{missing or ''}") from error
    if not (isinstance(found, type) and issubclass(found, base)) or isabstract(found):
        needed = f"a class that inherits from {base.__module__}.{base.__qualname__} and has all its methods"
        raise InputError(f"{where} {path}: is not {needed}")
    own = {key: _inner(f"{where}.{key}", value) for key, value in arguments.items()}
    try:
        return found(**own)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} {path}: {brief(error)}") from error


def _inner(where: str, value: Any) -> Any:
    """Return an argument of a part, which may be a part as text."""
    return made(where, value, Part) if isinstance(value, Mapping) and "class_path" in value else value


def chosen(value: str | P, ours: Mapping[str, Callable[[], P]]) -> P:
    """Return the part of an option: ours of that name, or a copy of one's own, for a network of its own."""
    return deepcopy(value) if isinstance(value, Part) else ours[value]()
