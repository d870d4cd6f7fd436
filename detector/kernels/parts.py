"""The parts of a detector by name, the same in profiles (`--trainer.profiler pytorch`) and in `frcnn benchmark`.

While no profiler is on, a mark costs less than a microsecond, and leaves nothing in a compiled or exported network. In
a trace the first group of names follow one another in a step; the second are within them. A backward pass has no marks:
PyTorch links its operators to those of the forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from torch.autograd import profiler

IMAGES: Final = "resize and pad images"
BACKBONE: Final = "backbone"
RPN_HEAD: Final = "rpn head"
PROPOSALS: Final = "proposals and NMS"
TARGETS: Final = "anchors, matching, sampling"
POOLING: Final = "RoI pooling"
BOX_HEAD: Final = "box head"
LOSSES: Final = "losses"
OPTIMIZER: Final = "optimiser"
DETECTIONS: Final = "detections and NMS"

ANCHORS: Final = "anchors"
MATCHING: Final = "matching"
SAMPLING: Final = "sampling"


@contextmanager
def part(name: str) -> Iterator[None]:
    """Mark what is computed within, or as a decorator a function, for a profiler that is on."""
    if profiler._is_profiler_enabled:
        with profiler.record_function(name):
            yield
    else:
        yield
