"""The options of a training, known without importing torch: what is refused at once.

`make options` writes the table, `option_table.json` beside this file, from the parser of `frcnn fit`; a test compares
them. What the table cannot know is left to that parser: class paths and their arguments, parts in files of their own,
and what the code names by now.
"""

from __future__ import annotations

import collections.abc
import datetime
import json
import os
import pathlib
import re
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

import yaml

from detector.errors import InputError, flat_options, shortened
from detector.files import check_checkpoint, check_growth, weights_file
from experiments.arguments import SECTIONS, add_options, values_of, with_named_parts
from experiments.dataset.data_format import FORMAT_NAMES, DataFormat, class_of_format
from experiments.run.folder import AXES_VARIABLE, LAST, run_folder_of
from experiments.run.options import RunOptions

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Rows = dict[str, tuple[str, Any, str]]
"""Name of an option, without dashes -> its type, default and help; of a part, such as model.rpn: "", None, a title."""

TYPES: Final = vars(typing) | {one.__name__: one for one in (collections, datetime, pathlib, NoneType)}
TYPES["ClassPath"] = Any  # of the parts of a detector, beside short names
TABLE: Final = Path(__file__).with_suffix(".json")
LIGHTNINGS: Final = re.compile(r"trainer\.|(ckpt_path|seed_everything|verbose|weights_only)$")
"""Options whose texts are Lightning's: `--help` reads them from the installed version, and the table has none."""


# ---- the table ----


@cache
def read_table() -> dict[str, Rows]:
    """Return the rows of all trainings, and those of one format (voc, coco) or command (fit, validate, test) alone."""
    table: dict[str, Rows] = json.loads(TABLE.read_text())
    return table


def write_table(table: dict[str, Rows]) -> None:
    """Write the table, an option a line."""
    parts = (
        f"{json.dumps(part)}: {{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        for part, rows in table.items()
    )
    TABLE.write_text("{" + "},\n".join(parts) + "}}\n")


def rows_of(parser: ArgumentParser) -> Rows:
    """Return the rows of a parser; classes of Lightning have the type Any, those of the detector ClassPath."""
    rows: Rows = {}
    parts = parser.groups or {}
    for action in (action for group in parser._action_groups for action in group._group_actions):
        if action.dest in parts:
            rows[action.dest] = ("", None, parts[action.dest].title or "")
        elif type(action).__name__ == "ActionLink":
            rows[action.dest] = ("Any", None, "")  # a config file may have it
        elif (hint := getattr(action, "_typehint", action.type)) and not action.dest.endswith(".help"):
            kind = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
            kind = re.sub(r"\b(pytorch_lightning|lightning_fabric)[\w.]+", "Any", kind)
            kind = re.sub(r"\bdetector(\.\w+)+|jsonargparse\.ClassPath, dict\[str, Any\]", "ClassPath", kind)
            text = "" if LIGHTNINGS.match(action.dest) else " ".join((action.help or "").replace("``", "").split())
            rows[action.dest] = (kind, action.default, text)
    return rows


@cache
def training_parser(command: str, options: type[Any], data_format: str) -> ArgumentParser:
    """Return a parser of a command that takes the options of a training.

    Args:
        command: Its name.
        options: The dataclass of its own options.
        data_format: Decides which options of data there are: voc, coco, yolo or own.
    """
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import restricted_string_type

    path = restricted_string_type("ClassPath", r"[A-Za-z_]\w*(\.\w+)+")
    types = TYPES | {"ClassPath": path | dict[str, Any]}
    parser = ArgumentParser(prog=f"frcnn {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file of options; of several, later ones win.")
    if options is not RunOptions:
        add_options(parser, options)
    table = read_table()
    rows = table["all"] | table[data_format] | table[command if command in table else "fit"]
    for name, (kind, default, text) in rows.items():
        if kind:
            required = name == "data.root"
            named: dict[str, Any] = {"type": eval(kind, types), "default": default, "required": required}
            parser.add_argument(f"--{name}", help=text or None, **named)
    return parser


# ---- what config files and arguments say ----


def find_data_format(arguments: Sequence[str]) -> DataFormat:
    """Return the format that is asked for by `--data_format`, or else by `data_format:` in the last of config files.

    Raises:
        InputError: It is neither one of ours nor a class path.
    """
    in_files = [
        content["data_format"] for _, content in config_files(arguments) if content.get("data_format") is not None
    ]
    asked: DataFormat = ["voc", *in_files, *values_of(arguments, "--data_format")][-1]
    if isinstance(asked, str) and asked.lstrip().startswith("{"):
        asked = yaml.safe_load(asked)
    class_of_format(asked)
    return asked


def with_whole_format(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which `--data_format.ARGUMENT VALUE` are part of the value of `--data_format`.

    Those of parts have whole names; see `with_whole_names`.

    Raises:
        InputError: As `find_data_format`, or they are given without a class path.
    """
    taken: dict[str, Any] = {}
    others: list[str] = []
    prefix, rest = "--data_format.", iter(with_whole_names(arguments))
    for word in rest:
        if word.startswith(prefix):
            name, equals, value = word.removeprefix(prefix).partition("=")
            taken[name.removeprefix("init_args.")] = yaml.safe_load(value if equals else next(rest, ""))
        else:
            others.append(word)
    if not taken:
        return others
    path, given = class_of_format(find_data_format(arguments))
    if path in FORMAT_NAMES:
        raise InputError(f"{prefix}{next(iter(taken))}: is for a format of one's own, which --data_format names")
    return [*others, f"--data_format={json.dumps({'class_path': path, 'init_args': given | taken})}"]


def config_files(arguments: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give each config file with its content; one that cannot be read is the parser's to complain about."""
    for name in values_of(arguments, "--config", "-c"):
        try:
            text = Path(name).read_text(encoding="utf-8")
            check_growth(text)
            content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            yield Path(name), content


def config_of_checkpoint(arguments: Sequence[str]) -> list[str]:
    """Return the option that names the config file of a checkpoint's run, unless there is one.

    Raises:
        InputError: The checkpoint is not there.
    """
    checkpoints = values_of(arguments, "--ckpt_path")
    checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint != LAST]
    for checkpoint in checkpoints:
        check_checkpoint(checkpoint)
    folder = run_folder_of(checkpoints[0]) if checkpoints and not values_of(arguments, "--config", "-c") else None
    return ["--config", str(folder / "config.yaml")] if folder else []


def check_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Refuse options, values, config files, checkpoints and datasets that are wrong or not there.

    Does nothing in processes that repeat a command that was checked: those of other devices, and cells of a grid.

    Args:
        parser: Of the table.
        arguments: Of the command.

    Raises:
        InputError: The checkpoint or the dataset is not there.
        ArgumentError: Something else is wrong.
    """
    if AXES_VARIABLE not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        config = parse_known(parser, arguments)
        if config is not None:
            check_files(parser.prog, config)


def with_whole_names(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which a section that is given a value, as in `--model.backbone NAME`, has its option's name.

    What follows of the section and is none of its options belongs to the part: `--model.backbone.width 8` becomes
    `--model.backbone.name.width 8`, also where a config file names the part.
    """
    contents = [flat_options(with_named_parts(content)) for _, content in config_files(arguments)]
    named = {section: f"{section}.{option}" for section, option in SECTIONS.items()}
    given = {
        section
        for section, whole in named.items()
        if any(f"{whole}.class_path" in content or _is_class(content.get(whole)) for content in contents)
    }
    words: list[str] = []
    for word, following in pairwise([*arguments, "--"]):
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        section = next((one for one in SECTIONS if name == one or name.startswith(f"{one}.")), "")
        if option.startswith("--") and section:
            whole, value_of = named[section], value if equals else following
            if name == section and ("class_path" in value_of or "{" not in value_of) and not Path(value_of).is_file():
                option = f"--{whole}"
            if option == f"--{whole}":
                (given.add if _is_class(value_of) else given.discard)(section)
            elif section in given and not any(
                name == one or name.startswith(f"{one}.") for one in _options_of(section)
            ):
                option = f"--{whole}{name.removeprefix(section)}"
        words.append(f"{option}{equals}{value}")
    return words


def _is_class(value: Any) -> bool:
    return "class_path" in str(value) or re.fullmatch(r"\w+(\.\w+)+", str(value)) is not None


def _options_of(section: str) -> list[str]:
    return [name for name in read_table()["all"] if name.startswith(f"{section}.")]


def parse_known(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace | None:
    """Return what arguments say, without those about classes; None where that is for the parser of trainings to say.

    Raises:
        ArgumentError: Something is wrong.
    """
    from jsonargparse import ArgumentError

    rows = [item for rows in read_table().values() for item in rows.items()]
    kinds = "^$", r"\bAny\b", "ClassPath"
    parts, classes, ours = ({name for name, row in rows if re.search(kind, row[0])} for kind in kinds)
    known, about_class = [], False
    for word in arguments:
        if re.match("--?[a-z]", word):
            name = word.partition("=")[0].removeprefix("--").rstrip("+")
            about_class = any(f"{name}.".startswith(f"{one}.") for one in classes)
            about_class |= any(name.startswith(f"{one}.") for one in ours)
            if name in parts or name == "print_config" or name.endswith(".help"):
                return None
        if not about_class:
            known.append(word)
    contents = (flat_options(content) for _, content in config_files(arguments))
    given = [item for content in contents for item in content.items() if item[0] in parts]
    for key, value in given:
        if not isinstance(value, str | dict) and (value is not None or key.startswith("model")):
            said = f"{key}: {shortened(str(value))} in a config file is no mapping of options"
            raise InputError(f"{said}, nor a file of them")
    if any(value for _, value in given):
        return None
    try:
        return parser.parse_args(known)
    except ArgumentError as error:
        named = re.search(r"--([\w.]+)|option '([\w.]+)|Parser key \"([\w.]+)", str(error))
        value = re.search(r"value: (.+)", str(error))
        option = next(filter(None, named.groups())) if named else ""
        is_of_another_format = value is None and option in dict(rows)
        if option and not is_of_another_format and _is_in_the_code(option, value and value[1]):
            return None
        raise


def _is_in_the_code(name: str, value: str | None) -> bool:
    """Return whether the code has an option, or a literal value of one, of which the table knows nothing yet."""
    of, last = name.split(".")[0], name.split(".")[-1]
    named = re.compile(rf"(?m)^ +{last}: " if value is None else rf"Literal\[[^]]*[\"']{re.escape(value)}[\"']")
    folders = {"model": "detector", "data": "datamodules", "trainer": "pytorch_lightning/trainer/trainer.py"}
    package = find_spec(folders.get(of, "").partition("/")[0] or "experiments")
    place = Path(str(package and package.origin)).parents[1] / folders.get(of, "none")
    sources = [place] if place.is_file() else place.glob("**/*.py")
    return any(named.search(path.read_text(encoding="utf-8")) for path in sources)


def check_files(prog: str, config: Namespace) -> None:
    """Refuse a checkpoint, weights or a dataset that are not there.

    Raises:
        InputError: Names it.
    """
    if config.get("ckpt_path") is not None:
        if config.ckpt_path != LAST:
            check_checkpoint(config.ckpt_path)
    elif prog in ("frcnn validate", "frcnn test"):
        raise InputError(f"{prog} needs --ckpt_path, for example runs/X/seed0/checkpoints/last.ckpt")
    elif prog == "frcnn fit":  # a checkpoint replaces all weights
        first = config.get("model.weights")
        key, hint = ("model.weights", "null") if first else ("model.backbone.weights", "imagenet or none")
        weights = str(first or config.get(key) or "")
        named = re.fullmatch(r"imagenet(_v[12])?|none|null|", weights.lower())
        if not named and not weights_file(Path(weights).expanduser()).is_file():
            raise InputError(f"--{key} {weights}: no such file; give one that is there, or {hint}")
    if not (config.data.get("download") or Path(config.data.root).expanduser().is_dir()):
        from experiments.dataset.formats import dataset_format

        dataset_format(config.data_format, config.data.root).check_root()
