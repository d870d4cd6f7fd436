"""What the plain argument parsers of the commands share: one line for bad usage, and lists as YAML has them."""

import argparse
from typing import NoReturn

from detector.errors import InputError


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
