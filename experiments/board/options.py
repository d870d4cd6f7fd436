"""The options of `frcnn tensorboard`."""

from dataclasses import dataclass, field

from experiments.arguments import positional


@dataclass(frozen=True, kw_only=True)
class TensorBoardOptions:
    """Show runs in TensorBoard, with the pictures of up to 200 validations, until Ctrl-C.

    Args:
        runs: A folder of runs, of a grid, or of one run.
        port: By default 6006, or the next one that is free; 0 is any free one.
        host: Address to listen at; 0.0.0.0 lets other machines in.
    """

    runs: str = field(default="runs", metadata=positional("RUNS"))
    port: int | None = None
    host: str = "localhost"
