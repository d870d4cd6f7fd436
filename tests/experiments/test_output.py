"""What commands show: numbers in columns, times, JSON of what is not finite, files that cannot be written."""

import json
import math

import pytest

from detector.errors import InputError
from experiments.output import counted, duration, json_text, number, option_text, percent, writing


def test_unknown_numbers_are_as_wide_as_known_ones():
    assert [number(value, "7.4f") for value in (0.5, None, math.nan)] == [" 0.5000", "      -", "      -"]
    assert number(math.nan, "+7.4f", "nan") == "    nan"
    assert number(None, ".1f") == "-"
    assert number(-0.25, "+.2f") == "-0.25"


def test_shares_are_shown_in_per_cent():
    assert [percent(share) for share in (0.125, 1.0, math.nan)] == [" 12.5 %", "100.0 %", "      -"]
    assert percent(0.051, ".0f") == "5 %"


def test_one_is_not_plural():
    assert [counted(many, "epoch") for many in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (126_000, "35.0 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_json_has_null_for_what_is_not_finite():
    text = json_text({"a": (1.5, math.nan), "b": {"c": -math.inf, "d": "nan"}})
    assert json.loads(text) == {"a": [1.5, None], "b": {"c": None, "d": "nan"}}


def test_options_as_on_the_command_line():
    assert [option_text(value) for value in ("x", [1, 2], None)] == ["x", "[1, 2]", "null"]


def test_a_file_that_cannot_be_written_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"^--output x: cannot be written \(Is a directory\)$"), writing("--output x"):
        tmp_path.write_text("")
    with pytest.raises(InputError, match=r"^as it is$"), writing("--output x"):
        raise InputError("as it is")
