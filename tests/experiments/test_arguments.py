"""From the table of commands and the dataclasses of their options to parsers, help texts and values."""

import contextlib
import io
import re
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import Literal

import pytest

from detector.errors import InputError
from experiments import cli
from experiments.arguments import (
    DataOptions,
    as_spelt_now,
    build,
    new_parser,
    one_line_of_the_parser,
    positional,
    some_of,
)
from experiments.cli import COMMANDS, Command, help_text, main

WITH_OPTIONS = [row for row in COMMANDS if row.options]


def load(place: str) -> object:
    module, name = place.split(":")
    return getattr(import_module(f"experiments.{module}"), name)


def help_of(row: Command) -> str:
    text, all_of_it = io.StringIO(), () if row.takes == "options" else ("all",)
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        assert not main([*row.name.split(), "--help", *all_of_it])
    return text.getvalue()


@pytest.mark.parametrize("row", WITH_OPTIONS, ids=lambda row: row.name)
def test_each_row_has_its_dataclass_and_its_function(row: Command) -> None:
    assert is_dataclass(load(row.options)) and callable(load(row.function))


@pytest.mark.parametrize("row", WITH_OPTIONS, ids=lambda row: row.name)
def test_each_help_shows_every_option_with_its_text(row: Command) -> None:
    text = help_of(row)
    assert text.startswith(f"usage: frcnn {row.name} ")
    options = load(row.options)
    for one in fields(options):
        if "positional" in one.metadata:
            assert f"\n  {one.metadata['positional']} " in text
        elif is_dataclass(one.type):
            taken = one.metadata["taken"]
            assert taken and all(f"\n  --data.{name} " in text for name in taken)
        else:
            assert re.search(rf"\n  --{one.name}\b[^\n]*(\n +| {{2,}})[A-Z0-9\"]", text), one.name
    assert "-" not in "".join(re.findall(r"\n  --([\w.-]+)", text))


def test_the_list_of_commands_is_made_from_the_table() -> None:
    text = help_text()
    for row in COMMANDS:
        assert (f"\n  {row.name} " in text and row.help in text) == (" " not in row.name)
    kinds = help_text("benchmark")
    assert re.findall(r"\n  (\w+) ", kinds) == ["train", "infer", "data", "evaluate"]


# ---- from a dataclass to a parser, and back ----


@dataclass(frozen=True, kw_only=True)
class Base:
    """Of several commands.

    Args:
        format: How it
            is shown.
    """

    format: Literal["table", "json"] = "table"


@dataclass(frozen=True, kw_only=True)
class Example(Base):
    """Do something.

    And more than 100 % of it.

    Args:
        files: What is read.
        data: The dataset.
        sizes: Some numbers.
        dry_run: Only say it.
        ratio: A number.
    """

    files: list[str] = field(metadata=positional("FILE"))
    data: DataOptions = field(metadata=some_of("class_names", required=("root",)))
    sizes: list[int] | None = None
    dry_run: bool = False
    ratio: float = 0.5


def parsed(*arguments: str) -> Example:
    given = as_spelt_now(arguments)
    parser = new_parser("frcnn example", Example)
    with one_line_of_the_parser(parser, given):
        return build(Example, parser.parse_args(given))


def test_values_and_defaults() -> None:
    options = parsed(
        "a", "b", "--data.root", "2007", "--sizes=[480, 600]", "--data.class_names", "[0, yes]", "--dry_run"
    )
    assert options == Example(
        files=["a", "b"], data=DataOptions(root="2007", class_names=["0", "yes"]), sizes=[480, 600], dry_run=True
    )
    assert parsed("--ratio", "1e-3", "a", "--data.root", "x").ratio == 0.001


@pytest.mark.parametrize(
    ("given", "read"),
    [("[480, 600]", [480, 600]), ("480,600", [480, 600]), ("480", [480]), ("[480]", [480])],
)
def test_lists_are_read_with_and_without_brackets(given: str, read: list[int]) -> None:
    assert parsed("a", "--data.root", "x", "--sizes", given).sizes == read


@pytest.mark.parametrize(("given", "read"), [("[1, 2]", [1, 2]), ("null", None)])
def test_lists_in_config_files(given: str, read: list[int] | None) -> None:
    parser = new_parser("frcnn example", Example)
    assert parser.parse_string(f"files: [a]\ndata: {{root: x}}\nsizes: {given}").sizes == read


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: FILE, --data.root (frcnn example --help shows all options)"),
        (["--format", "xml"], "--format xml: must be table or json"),
        (["--ratio", "half"], "--ratio half: must be a number"),
        (["--sizes", "[a]"], "argument --sizes: '[a]' is not a list of whole numbers, such as [480, 600]"),
        (["--sizes", "[480"], "argument --sizes: '[480' is not a list of whole numbers, such as [480, 600]"),
        (["--data.class_names", "[]"], "argument --data.class_names: '[]' is not a list of names, such as [a, b]"),
        (["--data.val_splits", "[val]"], "unrecognized arguments: --data.val_splits [val]"),
        (["--data.root"], "argument --data.root: expected one argument"),
        (["--rato", "1"], "unrecognized arguments: --rato 1; did you mean --ratio?"),
        (["--rati", "1"], "unrecognized arguments: --rati 1; did you mean --ratio?"),
        (["--class_names", "a"], "unrecognized arguments: --class_names a; did you mean --data.class_names?"),
        (["--zebra", "1"], "unrecognized arguments: --zebra 1 (frcnn example --help"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_option(arguments: list[str], said: str) -> None:
    needed = ["a", "--data.root", "x"] if arguments else []
    with pytest.raises(InputError) as error:
        parsed(*needed, *arguments)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_the_help_is_the_docstring() -> None:
    text = " ".join(new_parser("frcnn example", Example).format_help().split())
    for part in ("Do something. And more than 100 % of it.", "FILE What is read. (required", "How it is shown. (type"):
        assert part in text
    assert "--data.max_pixels" not in text


# ---- former spellings ----


def test_former_spellings() -> None:
    given = [
        "--dry-run",
        "--gpus-per-run=2-4",
        "a-b",
        "--data.max-pixels",
        "-3",
        "--max_pixels=5",
        "--bit_depth",
        "12",
        "-c",
    ]
    wanted = ["--dry_run", "--gpus_per_run=2-4", "a-b", "--data.max_pixels", "-3", "--data.max_pixels=5"]
    assert as_spelt_now(given) == [*wanted, "--data.bit_depth", "12", "-c"]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("ablate g.yaml --gpus-per-run 2", "gpus_per_run", 2),
        ("ablate g.yaml --dry-run", "dry_run", True),
        ("ablate g.yaml --launcher ray --ray-address auto", "ray_address", "auto"),
        ("doctor d --no-images", "no_images", True),
        ("doctor d --max_pixels 7", "data", DataOptions(max_pixels=7)),
        (
            "predict --ckpt_path c --images i --output o --max_pixels 7 --bit_depth 12",
            "data",
            DataOptions(bit_depth=12, max_pixels=7),
        ),
        ("benchmark train --no-memory", "no_memory", True),
    ],
)
def test_former_spellings_reach_the_command(arguments: str, name: str, value: object, monkeypatch) -> None:
    given: list[object] = []
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda place: load(place) if place.endswith("Options") else given.append)
    assert main(arguments.split()) == 0
    assert given and all(getattr(options, name) == value for options in given)
