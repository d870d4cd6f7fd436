"""Whether a file of torch.export computes with tensors and does nothing else.

PyTorch runs what such a file names: functions by their path, shapes as expressions of Python, and objects of pickles.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from detector.errors import InputError, shortened

_FUNCTIONS: Final = re.compile(
    r"torch\.ops\.(aten|torchvision|higher_order)\.\w+(\.\w+)?|torch\.sym_\w+"
    r"|_operator\.(add|sub|mul|neg|pow|mod|floordiv|truediv|and_|or_|eq|ne|lt|le|gt|ge|getitem)|math\.(ceil|floor|trunc)"
)
_WORDS: Final = frozenset(
    [
        "Add",
        "Mul",
        "Pow",
        "Mod",
        "PythonMod",
        "FloorDiv",
        "CleanDiv",
        "IntTrueDiv",
        "Min",
        "Max",
        "Integer",
        "Symbol",
        "True",
        "False",
        "integer",
        "positive",
        "nonnegative",
        "Equality",
        "Unequality",
        "GreaterThan",
        "LessThan",
        "StrictGreaterThan",
        "StrictLessThan",
        "And",
        "Or",
        "Not",
        "L",
        "images",
        "sizes",
        "original_sizes",
        "size",
        "torch",
        "sym_min",
        "sym_max",
        "and",
        "or",
        "not",
    ]
)


def check_program(path: Path) -> None:
    """Raise InputError for a file that names what is no function of tensors or of sizes."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                _check(json.loads(archive.read(name)))


def _check(value: Any, key: str = "") -> None:
    if isinstance(value, dict):
        for name, one in value.items():
            if key == "range_constraints":
                _check(name, "expr_str")
            _check(one, name)
    elif isinstance(value, list):
        for one in value:
            _check(one, key)
    elif isinstance(value, str) and key == "target" and value and not _FUNCTIONS.fullmatch(value):
        raise InputError(f"would run {shortened(value, 60)}, which no file of frcnn export does")
    elif isinstance(value, str) and key in ("expr_str", "guards_code"):
        words = re.findall(r"[^\W\d]\w*", value)
        if other := next((word for word in words if word not in _WORDS and not re.fullmatch(r"[su]\d+", word)), None):
            raise InputError(f"would evaluate {shortened(other, 60)}, which no file of frcnn export does")


@contextmanager
def weights_only() -> Iterator[None]:
    """Let `torch.load` read nothing but tensors, whatever PyTorch asks of it: no pickle runs code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}
