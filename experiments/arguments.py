"""What the commands share around their arguments: plain parsers, lists as YAML has them, one line for bad usage."""

import argparse
import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import NoReturn

from detector.errors import InputError

_CLASS_PATH_REASONS = "No module named|module '.*' has no attribute|Requirement |the following arguments are required"


class Parser(argparse.ArgumentParser):
    """Reports bad usage as every other bad input is reported: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help shows all options)")


def names(text: str) -> list[str]:
    """A list as the other commands take it: "[a, b]", or one name alone."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    names = [value] if isinstance(value, str | int) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names, such as [a, b]")
    return [str(name) for name in names]


def numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as [480, 600]") from None


def find_modules_here() -> None:
    """Let class paths name modules in the current folder, last, so that none of them hides one of ours or Python's."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def cause_of(text: str) -> str:
    """The reason in jsonargparse's many lines about a class path that cannot be used: a part of the message of one
    line. Other messages as they are."""
    key = re.match(r'\s*Parser key "([^"]+)"', text)
    given = re.search(r"Problem with given class_path '([^']+)':\s*([^\n]+)", text)
    if given is not None and re.match(_CLASS_PATH_REASONS, given[2]):
        reason = given[2].strip()
        if reason.startswith("No module named"):
            reason += f" (looked for in the current folder {os.getcwd()} and among the installed packages)"
        return f"--{key[1] if key else 'trainer'} {given[1]}: {reason}"
    broken = re.search(r"- ([^\n]+ \(\w+\.py, line \d+\))", text)
    if broken is not None and key is not None:
        return f"--{key[1]}: {broken[1]}"
    failed = re.search(r"Union subtypes.*?Errors:\n\s*- ([^\n]+)", text, re.DOTALL) if key is None else None
    if failed is not None:
        classes = list(dict.fromkeys(re.findall(r"class_path='([^']+)'", text)))
        return f"--trainer: {failed[1]}" + (f" ({', '.join(classes)})" if classes else "")
    return text


def add_max_pixels(parser: Parser) -> None:
    parser.add_argument(
        "--data.max_pixels",
        "--max_pixels",
        dest="max_pixels",
        type=int,
        default=178_956_970,
        help="images with more pixels are refused, before they are decoded (178956970)",
    )


def quiet() -> None:
    """Keep advertising and warnings about Lightning's own inside away from the user."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


@contextlib.contextmanager
def one_line_of_the_parser(arguments: list[str]) -> Iterator[None]:
    from jsonargparse import ArgumentError

    try:
        yield
    except ArgumentError as error:
        parts = [part for argument in arguments for part in argument.split("=", 1)]
        files = [value for option, value in pairwise(parts) if option in ("--config", "-c")]
        # A file that is no YAML is named by none of the parsers.
        raise InputError(cause_of(str(error)).replace("<unicode string>", " or ".join(files))) from None
