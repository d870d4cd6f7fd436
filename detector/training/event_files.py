"""What reading and writing TensorBoard's event files costs."""

import contextlib


def quick_checksums() -> None:
    """Let TensorBoard take google-crc32c for the checksums of what it writes and reads, where that is installed.

    TensorBoard computes them in Python, 4 MB a second: a report reads all pictures of all runs, and a training shares
    Python's lock with the thread that writes them.
    """
    with contextlib.suppress(ImportError):
        import google_crc32c
        from tensorboard.compat.tensorflow_stub import pywrap_tensorflow  # type: ignore[import-untyped]

        pywrap_tensorflow.crc32c = google_crc32c.value
