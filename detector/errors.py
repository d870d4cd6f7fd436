"""The exceptions that stand for bad input and for a failed training, as opposed to a bug; and how lines name files."""


class InputError(ValueError):
    """Bad configuration or bad data, in one line that names the file, key or value and says what would be right.

    The command line prints the line on stderr without a traceback and exits with 2.

    Attributes:
        details: further lines, printed below it: a list of which the line names the first entry.
    """

    details: tuple[str, ...] = ()


class TrainingError(RuntimeError):
    """A training that cannot go on, such as one whose loss is not a number, in one line that says where and what helps.

    The command line prints the line on stderr without a traceback and exits with 1.
    """


def printable(name: object) -> str:
    """A file name as any terminal shows it, in one line: what is no UTF-8 or no visible character as an escape."""
    try:
        text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair, which no file name brings along
        text = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
