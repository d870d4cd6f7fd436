"""Parts of one's own: what an option takes beside the names of ours, by class path, such as my_package.MyLoss.

An option such as `roi.reg_loss` has the type `Literal["smooth_l1", ...] | BoxLoss`: a short name, which a table beside
the base class turns into one of our classes, or an object of a class of one's own. In YAML, on the command line and in
checkpoints that is its class path with its arguments.
"""

import os
import re
import sys
from abc import ABC
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import isabstract, signature
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from detector.errors import InputError, brief, check_choices, type_hints
from detector.files import load_yaml
from detector.training.progress_line import RANKS

C = TypeVar("C")
P = TypeVar("P", bound="Part")
KNOWN_PACKAGES: Final = (
    *("detector", "datamodules", "experiments", "torch", "torchvision", "torchmetrics", "albumentations"),
    *("lightning", "pytorch_lightning", "lightning_fabric"),
)
_CLASS_PATH: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_SAID: Final[set[str]] = set()


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


def name_of(value: object) -> str:
    """Return the class path of a part, and any other value as text, for messages."""
    return str(value.as_text()["class_path"]) if isinstance(value, Part) else str(value)


def own_parts(**configs: Any) -> dict[str, str]:
    """Return the class path of each part of configs, by their sections, that is not one of ours by its short name."""
    return {
        f"{section}.{field.name}": name_of(value)
        for section, config in configs.items()
        for field in fields(config)
        if isinstance(value := getattr(config, field.name), Part)
    }


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
    for name, hint in type_hints(config.__class__).items():
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
    found = find_class(f"{where} {path}", path, base)
    own = {key: _inner(f"{where}.{key}", value) for key, value in arguments.items()}
    try:
        return found(**own)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} {path}: {brief(error)}") from error


def find_class(where: str, path: str, base: type[C]) -> type[C]:
    """Return the class that a path names.

    Raises:
        InputError: It is not there, or does not inherit from the base class and have all its methods; the message
            begins with `where`.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise InputError(f"{where}: is no class path, such as my_package.MyClass")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # what a module does when it is imported raises anything
        places = f" (looked for in the current folder {os.getcwd()} and among the installed packages)"
        raise InputError(f"{where}: {brief(error)}{places * isinstance(error, ModuleNotFoundError)}") from error
    if not (isinstance(found, type) and issubclass(found, base)) or isabstract(found):
        needed = "a class" if base is object else f"a class that inherits from {base.__module__}.{base.__qualname__}"
        raise InputError(f"{where}: is not {needed}{' and has all its methods' if isabstract(base) else ''}")
    return found


def _inner(where: str, value: Any) -> Any:
    """Return an argument of a part, which may be a part as text."""
    return made(where, value, Part) if isinstance(value, Mapping) and "class_path" in value else value


def chosen(value: str | P, ours: Mapping[str, Callable[[], P]]) -> P:
    """Return the part of an option: ours of that name, or a copy of one's own, for a network of its own."""
    return deepcopy(value) if isinstance(value, Part) else ours[value]()


# ---- classes of others ----


def strangers_in(content: Any, folder: Path = Path()) -> list[str]:
    """Return the class paths in options that are neither ours nor of PyTorch, Lightning or albumentations, each once.

    Args:
        content: Of a config file or a checkpoint.
        folder: Where the files are that options may name instead of a section.
    """
    found: dict[str, None] = {}

    def look(value: Any, key: str, above: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                look(inner, str(name).rpartition(".")[2], f"{above}.{name}")
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner, key, above)
        elif isinstance(value, str) and value.endswith((".yaml", ".yml")) and (folder / value).is_file():
            with suppress(InputError, OSError, UnicodeDecodeError):  # which is the parser's business
                look(load_yaml((folder / value).read_text()), "", above)
        elif isinstance(value, str) and _CLASS_PATH.fullmatch(value):
            may_be_class = key == "class_path" or (key != "weights" and not above.startswith(".data."))
            if may_be_class and value.partition(".")[0] not in KNOWN_PACKAGES:
                found[value] = None

    look(content, "", "")
    return [*found]


def say_strangers(source: str | Path, content: Any) -> None:
    """Say once, before they are imported, which classes of others the options of a run or a checkpoint name."""
    found = [path for path in strangers_in(content, Path(source).parent) if path not in _SAID]
    _SAID.update(found)
    if found and all(os.environ.get(rank, "0") == "0" for rank in RANKS):
        print(f"{source}: names classes of others, which are imported now: {', '.join(found)}", file=sys.stderr)
