"""The one exception that stands for bad input, as opposed to a bug."""


class InputError(ValueError):
    """Bad configuration or bad data, in one line that names the file, key or value and says what would be right.

    The command line prints the line on stderr without a traceback and exits with 2.

    Attributes:
        details: further lines, printed below it: a list of which the line names the first entry.
    """

    details: tuple[str, ...] = ()
