"""`--help` of commands that take the options of a training, without importing torch."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, Union, get_args, get_origin

from docstring_parser import parse

from detector.errors import InputError, listed
from experiments.arguments import description_of
from experiments.output import option_text
from experiments.run.option_table import TYPES, read_table, rows_of
from experiments.run.options import RunOptions

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

FIRST: Final = {
    "The run": ("config", "ckpt_path", "run_name", "seed_everything"),
    "The data": (
        *("data_format", "data.root", "data.train_splits", "data.val_splits"),
        *("data.batch_size", "data.augmentation"),
    ),
    "The detector": (
        *("model.backbone.name", "model.anchors.scales", "model.anchors.aspect_ratios"),
        *("model.image.shortest_side", "model.weights"),
    ),
    "The training": (
        *("model.optimizer.lr", "trainer.max_epochs", "trainer.accelerator", "trainer.devices"),
        "trainer.precision",
    ),
}
"""The twenty options that people change first."""


def part_of_help(arguments: Sequence[str]) -> str | None:
    """Return what help is asked for: "" of the first options, "all" or a part such as "model.rpn"; None: none."""
    words = [part for word in arguments for part in word.split("=", 1)]
    asked = [*(index for index, word in enumerate(words) if word in ("-h", "--help"))]
    return next(iter(words[asked[0] + 1 :]), "") if asked else None


def training_help(parser: ArgumentParser, options: type[Any], part: str) -> str:
    """Return the help of a command that takes the options of a training, in `COLUMNS` columns.

    Args:
        parser: Of the table.
        options: The dataclass of its own options.
        part: Of `part_of_help`; other options follow it on the command line.

    Raises:
        InputError: There is no such part.
    """
    rows = {"config": ("Any", None, "YAML file of options; of several, later ones win.")} | rows_of(parser)
    titles = {name: row[2] for rows in read_table().values() for name, row in rows.items() if not row[0]}
    lightnings = lightning_texts(parser.prog.removeprefix("frcnn "))
    own = () if options is RunOptions else tuple(field.name for field in fields(options))
    shows_all = bool(part) and not part.startswith("-")
    sections: dict[str, Sequence[str]] = {f"Of {parser.prog} alone": own} if own else {}
    if not shows_all:
        sections |= FIRST if parser.prog in ("frcnn fit", "frcnn validate", "frcnn test") else {}
    else:
        found: dict[str, list[str]] = {}
        for name in (name for name in rows if name not in own and (part == "all" or f"{name}.".startswith(f"{part}."))):
            above = name.rpartition(".")[0]
            found.setdefault(above or "The run", []).append(name)
        if not found:
            raise InputError(f"--help {part}: there are all, {listed([*titles], 20)}")
        sections |= found
    shown = argparse.ArgumentParser(
        prog=parser.prog,
        usage="%(prog)s --config FILE.yaml [--OPTION VALUE ...]",
        description=f"{description_of(options)} Options may stand in the file, each dot a level: "
        "model: {anchors: {scales: [8, 16, 32]}}; those of the command line win.",
        epilog=f"All {len(rows)} options: {parser.prog} --help all; those of a part: {parser.prog} --help model.rpn; "
        "the arguments of a class: --trainer.callbacks.help EarlyStopping.",
        add_help=False,
    )
    for title, names in sections.items():
        group = shown.add_argument_group(title, titles.get(title))
        for name in (name for name in names if name in rows):
            kind, default, text = rows[name]
            text = text or lightnings.get(name, "")
            values = _values(eval(kind, TYPES)) if name != "config" else "FILE.yaml"
            short = len(values) <= 24
            said = name == "config" or (default is None and "default" in text.lower())
            default = [] if said else ["required" if name == "data.root" else f"default: {option_text(default)}"]
            more = "; ".join([*([] if short else [values.replace("|", " | ")]), *default])
            text = text if shows_all else text.partition(". ")[0].rstrip(".") + "."
            text = (f"{text} ({more})" if more else text).replace("%", "%%")
            group.add_argument(f"--{name}", metavar=values if short else "VALUE", help=text)
    return shown.format_help()


def _values(hint: Any) -> str:
    """Return the values of a type, such as sgd|adamw, int|null, or [float]."""
    of, origin = get_args(hint), get_origin(hint)
    if origin in (Literal, Union, UnionType):
        texts = "|".join(str(one) if origin is Literal else _values(one) for one in of)
        return "|".join(dict.fromkeys(texts.split("|")))
    if origin is list:
        return f"[{_values(of[0])}]"
    names = {NoneType: "null", bool: "true|false", Any: "class", str: "text", Path: "text"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


@cache
def lightning_texts(command: str) -> dict[str, str]:
    """Return what Lightning says of its own options, from the source of the installed version.

    Args:
        command: Of which the options `ckpt_path` and `verbose` are.
    """
    package = find_spec("pytorch_lightning")
    source = Path(str(package and package.origin)).parent / "trainer" / "trainer.py"
    methods = {"__init__": "trainer.", command if command in ("validate", "test") else "fit": ""}
    texts = {"seed_everything": "Seed of everything that is random; true: another one each time."}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name in methods:
            for one in parse(ast.get_docstring(node) or "").params:
                text = (one.description or "").replace("``", "").replace(".Set to", ". Set to")
                texts[methods[node.name] + one.arg_name] = " ".join(text.split())
    return texts
