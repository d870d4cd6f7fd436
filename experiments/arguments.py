"""From the dataclass of a command's options to its parser, its help and its values; options that commands share.

Imports nothing slow, so that a help text and bad usage are told at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from detector.errors import InputError, brief
from detector.files import check_growth
from experiments.output import check_plot
from experiments.run.parser_errors import cause_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Options = TypeVar("Options")
SECTIONS: Final = {"model.backbone": "name", "model.anchors": "generator", "model.optimizer": "name"}
"""Parts of the options that take a name or a class path themselves, and which of their options that is."""
FORMER: Final = {"--max_pixels": "--data.max_pixels", "--bit_depth": "--data.bit_depth"}


# ---- options that several commands share ----


class _Options:
    def __post_init__(self) -> None:
        """Check nothing: the end of the chain of those who do."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The dataset; a command takes some of these options, named as those of `frcnn fit`.

    Args:
        root: Folder that holds VOC<year>/, or a dataset folder, as for frcnn fit.
        train_splits: Splits, as for frcnn fit: "[2007_trainval]".
        val_splits: Splits, as for frcnn fit: "[2007_test]".
        test_splits: Splits, as for frcnn fit.
        val_fraction: Make splits, as for frcnn fit: the share of the images of train_splits, or of all, to validate on.
        split_seed: Another one divides the images otherwise.
        image_dirs: Folders of the images of COCO files, as for frcnn fit.
        class_names: Names of labels 1, 2, ...; by default the 20 VOC classes for VOC years, else those that are found.
        bit_depth: Bits of the values in 16-bit images; by default 16, or those of the training.
        max_pixels: Images with more pixels are refused, before they are decoded.
    """

    root: str = ""
    train_splits: list[str] | None = None
    val_splits: list[str] | None = None
    test_splits: list[str] | None = None
    val_fraction: float | None = None
    split_seed: int = 0
    image_dirs: list[str] | None = None
    class_names: list[str] | None = None
    bit_depth: int | None = None
    max_pixels: int = 178_956_970


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """How results are printed.

    Args:
        format: A table to read, or one JSON document.
    """

    format: Literal["table", "json"] = "table"


@dataclass(frozen=True, kw_only=True)
class PlotOptions(_Options):
    """What is drawn.

    Args:
        plot: File for the picture: .png, .pdf or .svg.
    """

    plot: str | None = None

    def __post_init__(self) -> None:
        """Refuse a file that cannot be drawn, before anything is computed."""
        super().__post_init__()
        if self.plot is not None:
            check_plot(self.plot)


@dataclass(frozen=True, kw_only=True)
class ResampleOptions(_Options):
    """95 % intervals.

    Args:
        bootstrap: Resamples of the images, for 95 % intervals.
        seed: Seed of the resamples.
    """

    bootstrap: int | None = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what gives no interval."""
        super().__post_init__()
        if self.bootstrap is not None and self.bootstrap < 2:
            raise InputError(f"--bootstrap {self.bootstrap}: at least 2 resamples are needed; 1000 are usual")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(_Options):
    """Which detections count.

    Args:
        score_threshold: Detections from this score on are shown and counted.
    """

    score_threshold: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no score."""
        super().__post_init__()
        if not 0 <= self.score_threshold <= 1:
            raise InputError(f"--score_threshold {self.score_threshold}: must be in 0..1")


def check_least(options: object, **least: int) -> None:
    """Raise InputError for an option below its least value; None is none."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise InputError(f"--{name} {value}: must be at least {low}")


def positional(name: str) -> Mapping[str, Any]:
    """Return the metadata of a field that is given by its place: a list takes one or more, a default none or one."""
    return {"positional": name}


def some_of(*names: str, required: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return the metadata of a field whose type is a dataclass of which a command takes these fields alone."""
    return {"taken": (*required, *names), "required": required}


# ---- from a dataclass to a parser, and back ----


def add_options(
    parser: ArgumentParser, options: type[Any], prefix: str = "", metadata: Mapping[str, Any] | None = None
) -> None:
    """Add an option for each field of a dataclass, with its type, its default and its text in the docstring.

    Names begin with the prefix, such as "data."; for the metadata see `some_of`.
    """
    hints, texts = get_type_hints(options), _texts(options)
    chosen = metadata or {}
    for field in fields(options):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            add_options(parser, hint, f"{name}.", field.metadata)
        elif field.name in chosen.get("taken", [field.name]):
            named: dict[str, Any] = {"help": texts[field.name], **_parsed_type(hint)}
            if "positional" in field.metadata:
                several = {"nargs": "+", "type": str} if get_origin(hint) is list else {}
                optional = {} if field.default is MISSING else {"nargs": "?", "default": field.default}
                place = {"metavar": field.metadata["positional"]}
                parser.add_argument(name, **named | several | optional | place)
            elif "repeated" in field.metadata:
                parser.add_argument(f"--{name}", action="append", default=[], help=texts[field.name])
            elif hint is bool:
                parser.add_argument(f"--{name}", action="store_true", help=texts[field.name])
            elif field.name in chosen.get("required", ()) or (field.default, field.default_factory) == (MISSING,) * 2:
                parser.add_argument(f"--{name}", required=True, **named)
            else:
                default = field.default if field.default_factory is MISSING else field.default_factory()
                parser.add_argument(f"--{name}", default=default, **named)


def build(options: type[Options], values: Namespace) -> Options:
    """Return a dataclass with the values of a parser that has its options.

    Raises:
        InputError: It refuses them.
    """
    hints = get_type_hints(options)
    given = {name: values[name] for name in hints if name in values}
    nested = {name: build(hints[name], value) for name, value in given.items() if is_dataclass(hints[name])}
    return options(**given | nested)


def new_parser(prog: str, options: type[Any]) -> ArgumentParser:
    """Return the parser of a command; its help says what the docstring of its options says."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description_of(options), exit_on_error=False, allow_abbrev=False)
    add_options(parser, options)
    return parser


def description_of(options: type[Any]) -> str:
    """Return what the docstring of the options of a command says before those."""
    import docstring_parser

    text = docstring_parser.parse(options.__doc__ or "")
    return " ".join(part for part in (text.short_description, text.long_description) if part)


def _texts(options: type[Any]) -> dict[str, str]:
    import docstring_parser

    parents = [parent for parent in reversed(options.__mro__) if is_dataclass(parent)]
    found = [argument for parent in parents for argument in docstring_parser.parse(parent.__doc__ or "").params]
    return {argument.arg_name: " ".join((argument.description or "").split()) for argument in found}


def _parsed_type(hint: Any) -> dict[str, Any]:
    """Return `type` and `metavar` of an option; lists are read more leniently than by jsonargparse."""
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(kind) is list:
            listed = _ListOf(*get_args(kind))
            return {"type": listed, "metavar": f"[{'|'.join(listed.choices) or 'ITEM'},...]"}
        if get_origin(kind) is Literal:
            return {"type": hint, "metavar": f"{{{','.join(get_args(kind))}}}"}
    return {"type": hint}


class _ListOf:
    """A reader of lists as YAML has them, without brackets, or of one item alone: "[a, b]", "0,1"."""

    def __init__(self, item: type[Any]) -> None:
        self.item = item
        self.choices = get_args(item)  # of a Literal

    def __call__(self, text: str | list[Any] | None) -> list[Any] | None:
        if text is None:  # in a config file
            return None
        try:
            bare = isinstance(text, str) and not text.lstrip().startswith("[")
            items = yaml.load(f"[{text}]" if bare else text, yaml.BaseLoader) if isinstance(text, str) else text
            if not items or not all(isinstance(item, str | int) for item in items):
                raise ValueError
            if self.choices:
                return [self.choices[self.choices.index(item)] for item in items]
            return [self.item(item) for item in items]
        except (ValueError, yaml.YAMLError):
            wanted = "whole numbers, such as [480, 600]" if self.item is int else "names, such as [a, b]"
            wanted = ", ".join(self.choices) or wanted
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {wanted}") from None

    def __repr__(self) -> str:
        return f"list[{f'Literal{list(self.choices)}' if self.choices else self.item.__name__}]"


# ---- around the arguments ----


def as_spelt_now(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the options that were spelt otherwise in earlier versions, such as --dry-run."""

    def spelt(argument: str) -> str:
        option, *value = argument.split("=", 1)
        option = f"--{option[2:].replace('-', '_')}"
        return "=".join([FORMER.get(option, option), *value])

    return [spelt(one) if one.startswith("--") else one for one in arguments]


def values_of(arguments: Sequence[str], *options: str) -> list[str]:
    """Return the values that follow options, after = or as the next argument."""
    parts = [part for one in arguments for part in (one.split("=", 1) if one.startswith("-") else [one])]
    return [value for option, value in pairwise(parts) if option in options]


def find_modules_here() -> None:
    """Let class paths name modules in the current folder, last, so that none of them hides one of ours or Python's."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


@contextlib.contextmanager
def one_line_of_the_parser(parser: ArgumentParser, arguments: Sequence[str]) -> Iterator[None]:
    """Raise what jsonargparse complains about as an `InputError` of one line.

    Args:
        parser: Knows all options of the command; another one of them may complain.
        arguments: Given to it, to name the config file, which none of the parsers does.
    """
    from jsonargparse import ArgumentError

    _bound_yaml()
    files = values_of(arguments, "--config", "-c")
    for file in filter(os.path.isfile, files):
        try:
            Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"--config {file}: is no text in UTF-8 ({brief(error)}); save it as UTF-8") from None
    try:
        yield
    except ArgumentError as error:
        cause = cause_of(str(error), parser).replace("<unicode string>", " or ".join(files))
        unknown = re.search(r"(?:unrecognized arguments: (--)|there is no option )([\w.]+)", cause)
        meant = _most_alike(unknown[2], parser) if unknown else ""
        cause += f"; did you mean {unknown[1] or ''}{meant}?" if unknown and meant else ""
        every = "--help all" if "--config" in parser._option_string_actions else "--help"
        more = "" if "\n" in cause or cause.startswith("--") else f" ({parser.prog} {every} shows all options)"
        raise InputError(cause + more) from None


def with_named_parts(content: Any) -> Any:
    """Return the content of a config file in which a section that is a part itself has it as its option of that.

    So `backbone: {class_path: my_package.Net}` and `backbone: my_package.Net` are the same as with `name:` before it.
    """
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return content
    sections = dict(model)
    for path, option in SECTIONS.items():
        given = sections.get(name := path.rpartition(".")[2])
        if isinstance(given, dict) and "class_path" in given:
            part = {key: value for key, value in given.items() if key in ("class_path", "init_args")}
            sections[name] = {key: value for key, value in given.items() if key not in part} | {option: part}
        elif isinstance(given, str) and not given.endswith((".yaml", ".yml", ".json")):
            sections[name] = {option: given}
    return content | {"model": sections}


def _bound_yaml() -> None:
    """Let jsonargparse read YAML with `with_named_parts`, and none, of files and values, that takes too long."""
    from jsonargparse import get_loader, set_loader

    usual = get_loader("yaml")

    def load(text: str) -> Any:
        check_growth(text)
        try:
            return with_named_parts(usual(text))
        except ValueError as error:  # such as a number of thousands of digits
            raise yaml.YAMLError(brief(error)) from error

    if usual.__module__ != __name__:
        set_loader("yaml", load, (yaml.YAMLError,))


def _most_alike(name: str, parser: ArgumentParser) -> str:
    """Return the option that a misspelt one may have meant, or "": alike in its last part, and most as a whole."""

    def likeness(option: str) -> tuple[bool, float]:
        last, whole = (
            SequenceMatcher(None, *pair).ratio()
            for pair in ((name.rpartition(".")[2], option.rpartition(".")[2]), (name, option))
        )
        return last >= 0.6, last + whole

    options = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
    best = max(options, key=likeness)
    return best if likeness(best)[0] else ""
