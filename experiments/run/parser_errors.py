"""What jsonargparse complains about, in many lines, as a part of one line."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_CLASS_PATH_REASONS = "No module named|module '.*' has no attribute|Requirement |the following arguments are required"
_OF_PART = r"Subtypes: .*(<class 'detector\.[\w.]+'>|ClassPath)"
_OF_LIGHTNING = (  # a class that is there, with a wrong argument or of another kind
    r"Subtypes: .*pytorch_lightning[\s\S]*"
    r"(Option '[\w.]+' is not accepted|Import path does not correspond|class_path '[^']+':\s+Parser key)"
)
_TYPES: Final = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'dict'>": "a mapping: {...}",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text, in quotes",
}


def cause_of(text: str, parser: ArgumentParser | None = None) -> str:
    """Return the reason that stands in many lines of jsonargparse, as a part of one line; other texts as they are.

    The parser of the command names what is given by its place.
    """
    if required := re.fullmatch(r"the following arguments are required: (.+)", text.strip(), re.IGNORECASE):
        places = {one.dest: str(one.metavar) for one in parser._actions if not one.option_strings} if parser else {}
        names = [re.sub(r"^(fit|validate|test)\.", "", name) for name in required[1].split(", ")]
        return f"the following arguments are required: {', '.join(places.get(name, f'--{name}') for name in names)}"
    if missing := re.search(r'"config":\s+File does not exist: .(.+).$', text.strip()):
        return f"--config {os.path.relpath(missing[1])}: no such file"
    key = re.match(r'\s*Parser key "([^"]+)"', text)
    if section := re.search(r'Unable to load config (.+)\n\s*- Parser key "(.+)": Unable', text):
        return f"--{section[2]} {section[1]}: is no mapping of options, nor a file of them"
    if re.search(_OF_PART, text) or re.search(_OF_LIGHTNING, text):
        return _wrong_part(key[1] if key else "model", text)
    if unknown := re.search(r"(?:Option '([\w.]+)' is not|does not accept option '([\w.]+)')", text):
        return f"<unicode string>: there is no option {unknown[1] or unknown[2]}"
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
    return (key and _wrong_value(key[1], text)) or text


def _wrong_part(option: str, text: str) -> str:
    """Return what jsonargparse says about an option that takes a short name or a class path."""
    given = re.search(r"Problem with given class_path '([^']+)':\s*([^\n]+)\s*([^\n]*)", text)
    value, base = re.search(r"Given value: (.*)", text), re.search(r"subclass of (\w+)", text)
    path = given[1] if given else str(value and value[1])
    if made := re.search(r"  - ([^\n]+)\nGiven value type[^\n]+Namespace.*class_path='([^']+)'", text, re.DOTALL):
        return f"--{option} {made[2]}: {made[1]}"
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", text):
        return f"--{option} {path}: has no argument {unknown[1]}"
    if given and (argument := re.match(r'Parser key "(.+)"', given[2])):
        return _wrong_value(f"{option}.{argument[1]}", given[3]) or f"--{option} {path}: {given[3]}"
    if given:
        where = f" (looked for in the current folder {os.getcwd()} and among the installed packages)"
        return f"--{option} {path}: {given[2]}" + where * given[2].startswith("No module named")
    if base or "is abstract" in text:
        needed = f"inherits from {base[1]}" if base else "has all methods of its base"
        return f"--{option} {path}: is not a class that {needed}"
    literals = re.findall(r"Expected a typing\.Literal\[(.+?)\]", text)
    names = [name.strip("'") for one in literals for name in one.split(", ")]
    return f"--{option} {path}: must be {' or '.join(names)} or a class path such as my_package.MyClass"


def _wrong_value(key: str, text: str) -> str | None:
    """Return what jsonargparse says about a value of a plain type, in words."""
    value = re.search(r"(?:Got|Given) value: ([^\n]*)\s*$", text)
    wanted = re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[.+?\]|[^\n]+?)(?:\.|\n)", text)
    kinds = [_TYPES.get(kind) or kind.partition("Literal[")[2] for kind in wanted if "None" not in kind]
    if value is None or not all(kinds):
        return None
    choices = " or ".join(kinds).replace("'", "").replace("]", "").replace(", ", " or ")
    return f"--{key} {value[1]}: must be {choices}"
