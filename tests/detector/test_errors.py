"""How messages name things: in one line that is not too long."""

from detector.errors import brief, listed, shortened


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
