"""What makes a command start and end sooner: most of its time is the import of torch and Lightning."""

import atexit
import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import inside without the garbage collector, and leave what was imported out of its collections for good.

    The import of torch and Lightning makes about a million objects that last; the collector would go through all of
    them again and again. Does nothing where torch is imported already: that time is spent.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    if "torchmetrics" not in sys.modules:
        sys.meta_path.insert(0, _Torchmetrics())
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or extension modules complain at the end of what they take for leaks
        gc.enable()


class _Torchmetrics(MetaPathFinder):
    """A way to import torchmetrics without what others need: `scipy.signal` and matplotlib, 0.7 s of imports."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find its two modules that ask for them, to be executed in another way."""
        ways = {"torchmetrics": _without_scipy_signal, "torchmetrics.utilities.plot": _without_matplotlib}
        spec = PathFinder.find_spec(fullname, path) if fullname in ways else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(ways[fullname], spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _without_scipy_signal(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Let it find a stand-in; whoever asks later imports the module itself.

    Version 1.9 gives it an old name, for a package that is not used here, and has no other use of it until a metric of
    sound is called.
    """
    name = "scipy.signal"
    stand_in = ModuleType(name)
    vars(stand_in)["hamming"] = None
    found = sys.modules.setdefault(name, stand_in)
    try:
        execute(module)
    finally:
        if found is stand_in:
            del sys.modules[name]


def _without_matplotlib(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Import matplotlib when a metric is plotted, not before."""
    from torchmetrics.utilities import imports

    known = vars(imports).get("_MATPLOTLIB_AVAILABLE", False)
    vars(imports)["_MATPLOTLIB_AVAILABLE"] = False
    try:
        execute(module)
    finally:
        vars(imports)["_MATPLOTLIB_AVAILABLE"] = vars(module)["_MATPLOTLIB_AVAILABLE"] = known
        vars(module).update(matplotlib=_Later("matplotlib"), plt=_Later("matplotlib.pyplot"))


class _Later:
    """A module that is imported when something in it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


def run_process(command: Callable[[], int]) -> int:
    """Run the command that this process was started for, and return its exit status.

    After a help text (`SystemExit` without a failure) or bad usage (status 2) the process ends as soon as all exit
    handlers have run: Python would then free all objects of torch and Lightning one by one, for a second. One of
    several processes of a training always does: gloo's threads still free tensors, and abort a process whose
    interpreter is gone (pytorch/pytorch#179291); DistributedDataParallel keeps them after destroy_process_group.
    """
    ended: list[int] = []
    atexit.register(_leave, ended)  # the first to be registered is the last to be run
    try:
        status = command()
    except SystemExit as end:
        if not end.code or (isinstance(end.code, int) and _is_one_of_several()):
            ended.append(end.code or 0)
        raise
    if status == 2 or _is_one_of_several():
        ended.append(status)
    return status


def _is_one_of_several() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave(ended: list[int]) -> None:
    if not ended:
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, as `head` does
            stream.flush()
    os._exit(ended[0])
