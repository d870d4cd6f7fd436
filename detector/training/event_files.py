"""TensorBoard's event files."""

import contextlib


def quick_checksums() -> None:
    """Let TensorBoard take google-crc32c for the checksums of what it writes and reads, where that is installed.

    It computes them in Python, of 4 MB a second: a report reads all pictures of all runs, and a training computes
    beside the thread that writes them.
    """
    with contextlib.suppress(ImportError):
        import google_crc32c
        from tensorboard.compat.tensorflow_stub import pywrap_tensorflow  # type: ignore[import-untyped]

        pywrap_tensorflow.crc32c = google_crc32c.value
