"""The options of `frcnn tensorboard` and `frcnn serve`."""

from dataclasses import dataclass, field

from detector.errors import InputError
from experiments.arguments import check_least, positional


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


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Show what a trained detector sees in an image, on a page in the browser, until Ctrl-C; needs '.[serve]'.

    Drop an image; choose score, classes, and what is drawn: detections, where each comes from, proposals, anchors;
    click a box for its class scores.

    Args:
        run: A run's folder, a checkpoint, or what frcnn export --format safetensors wrote.
        beside: Another one, to be compared on the same image.
        port: By default 7860, or the next one that is free; 0 is any free one.
        host: Address to listen at; 0.0.0.0 lets everybody in who reaches this machine: there is no password.
        api: Also answer POST /detect: "curl -F image=@photo.jpg ADDRESS/detect?score_threshold=0.5" prints JSON.
        max_megabytes: Larger images are refused.
        requests_per_minute: Requests to the API that one address may make.
        device: Such as cpu or cuda; by default a GPU where there is one.
    """

    run: str = field(metadata=positional("RUN"))
    beside: str | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    api: bool = False
    max_megabytes: float = 20.0
    requests_per_minute: int = 60
    device: str | None = None

    def __post_init__(self) -> None:
        """Refuse limits that let nothing in."""
        check_least(self, requests_per_minute=1)
        if not self.max_megabytes > 0:
            raise InputError(f"--max_megabytes {self.max_megabytes:g}: must be more than 0")
