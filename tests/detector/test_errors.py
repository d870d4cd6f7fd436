"""How messages name things: in one line that is not too long."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from detector.errors import (
    InputError,
    brief,
    check_choices,
    check_numbers,
    flat_options,
    listed,
    shortened,
    shown_options,
)


@dataclass
class Config:
    share: float = 0.5
    count: int | None = None
    sides: list[float] = field(default_factory=lambda: [1.0])
    kind: Literal["a", "b"] = "a"
    add: bool | Literal["some"] = True
    weights: list[float] | Literal["none"] = "none"


ALLOWED = {"[0, 1)": "share", "[1, inf]": "count", "(0, inf]": "sides"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1}, r"^part\.share: 1 must be in \[0, 1\)$"),
        ({"share": -0.1}, r"^part\.share: -0\.1 must be in \[0, 1\)$"),
        ({"share": float("nan")}, r"^part\.share: nan must be in \[0, 1\)$"),
        ({"count": 0}, r"^part\.count: 0 must be >= 1$"),
        ({"sides": [1.0, 0.0]}, r"^part\.sides: \[1\.0, 0\.0\] must be positive$"),
        ({"kind": "c"}, r"^part\.kind: 'c' is none of a, b$"),
        ({"add": "all"}, r"^part\.add: 'all' is none of true, false, some$"),
        ({"weights": "even"}, r"^part\.weights: 'even' is none of none, a list$"),
    ],
)
def test_values_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    config = Config(**options)
    with pytest.raises(InputError, match=message):
        check_numbers("part", config, ALLOWED)
        check_choices("part", config)


@pytest.mark.parametrize(
    "options", [{"share": 0}, {"count": 1}, {"sides": [1e-9, float("inf")]}, {"add": "some"}, {"weights": [0.5]}]
)
def test_values_at_the_ends_of_their_range_are_taken(options: dict[str, Any]) -> None:
    check_numbers("part", Config(**options), ALLOWED)
    check_choices("part", Config(**options))


def test_options_on_one_level() -> None:
    nested = {"a": {"b": {"c": 1}, "d": {}}, "e": [2]}
    assert flat_options(nested) == {"a.b.c": 1, "a.d": {}, "e": [2]}
    assert flat_options(nested, "/") == {"a/b/c": 1, "a/d": {}, "e": [2]}


def test_a_line_with_an_endless_value_lacks_its_middle():
    text = str(InputError(f"grid.yaml: base: {'9' * 5000}: no such file"))
    assert len(text) == 2005
    assert text.startswith("grid.yaml: base: 999") and text.endswith("999: no such file") and "9 ... 9" in text
    assert str(InputError("x" * 2000)) == "x" * 2000


def test_lists_say_how_many_are_left_out():
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(["a", "b", "c", "d", "e"], 3) == "a, b, c and 2 more"
    assert listed([]) == ""


def test_texts_are_cut_to_one_line():
    assert shortened("a\n  b") == "a b"
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 57 + "..."
    assert shortened("abcdefgh", 6) == "abc..."


def test_errors_without_a_message_are_named_by_type():
    assert brief(ValueError("two\nlines")) == "two lines"
    assert brief(KeyError()) == "KeyError"


def test_parts_are_shown_under_their_option() -> None:
    wing = {"class_path": "lab.Wing", "init_args": {"omega": 3, "inner": {"class_path": "lab.L1", "init_args": {}}}}
    config = {"roi": {"reg_loss": wing, "nms": {"class_path": "lab.Best"}}, "data_format": "voc", "empty": {}}
    shown = {"roi.reg_loss": "lab.Wing", "roi.reg_loss.omega": 3, "roi.reg_loss.inner": "lab.L1", "roi.nms": "lab.Best"}
    assert shown_options(config) == shown | {"data_format": "voc", "empty": {}}
    assert shown_options({"roi": {"reg_loss": wing}}, "/")["roi/reg_loss/omega"] == 3
