"""The options of `frcnn benchmark KIND`."""

from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from detector.errors import InputError
from experiments.arguments import DataOptions, FormatOptions, PlotOptions, check_least, some_of

PRECISIONS: Final = ("32-true", "tf32", "bf16-mixed", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(FormatOptions, PlotOptions):
    """What `frcnn benchmark train` and `infer` have in common.

    Args:
        networks: Of vgg16, resnet50_c4 and resnet50_fpn at 600x800 pixels, resnet18_fpn, mobilenet_v2_fpn and
            mobilenet_v3_large_320_fpn at 320x416; by default all.
        config: The network of an experiment's file instead.
        option: KEY=VALUE of --config: model.rpn.pre_nms_train=6000; may be repeated.
        size: Pixels of the images of --networks, "[height, width]"; by default each network's own.
        batch_sizes: Images; by default [1, 4]; of a sweep over them [1, 2, 4, 8], on a GPU up to 16, of other sweeps
            and --devices 1.
        precisions: By default 32-true, and bf16-mixed or 16-mixed if the device computes it; with --sweep or --devices
            32-true. Also tf32, a GPU's float32 with TensorFloat-32 products.
        peer: What it is compared with.
        repeats: Timed rounds of all in turn; medians count.
        compile: Compile ours; torchvision's stays as it is.
        no_memory: Do not measure the peak memory of a step as well.
        time_limit: Seconds for processes started to measure.
        sweep: Instead: ours alone at 1 to 300 objects, 9 to 60 anchors per location, or several numbers of images.
        plot: Draw the sweep into this file (.png, .pdf, .svg).
    """

    kind: ClassVar[Literal["train", "infer"]] = "infer"
    networks: list[str] | None = None
    config: str | None = None
    option: list[str] = field(default_factory=list, metadata={"repeated": True})
    size: list[int] | None = None
    batch_sizes: list[int] | None = None
    precisions: list[str] | None = None
    peer: Literal["torchvision", "none"] = "torchvision"
    repeats: int = 5
    compile: bool = False
    no_memory: bool = False
    time_limit: float = 900
    sweep: Literal["objects", "anchors", "batch_size"] | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if self.plot is not None and self.sweep is None:
            raise InputError(f"--plot {self.plot}: is for --sweep")
        if self.time_limit <= 0:
            raise InputError(f"--time_limit {self.time_limit:g}: must be above 0")
        check_least(self, repeats=1)
        if min(self.batch_sizes or [1]) < 1:
            raise InputError(f"--batch_sizes {self.batch_sizes}: must be at least 1")
        for precision in self.precisions or ():
            if precision not in PRECISIONS:
                raise InputError(f"--precisions: {precision!r} is none of {', '.join(PRECISIONS)}")


@dataclass(frozen=True, kw_only=True)
class InferOptions(NetworkOptions):
    """Time detection, beside torchvision's detector.

    Args:
        detectors: Instead: trained detectors in turn, each a checkpoint, a run's folder, or what frcnn export wrote (a
            file or its folder); in float32, on the CPU if one is exported. The first is what the others are compared
            with. Of the other options they take --batch_sizes, --size and --repeats.
    """

    detectors: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        others = ("networks", "config", "precisions", "sweep")
        if self.detectors is not None and (given := [name for name in others if getattr(self, name) is not None]):
            raise InputError(f"--detectors and --{given[0]}: give one of them")
        if self.detectors == []:
            raise InputError("--detectors: give at least one")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(NetworkOptions):
    """Time a training step, beside torchvision's detector.

    Args:
        devices: Instead: ours alone on so many GPUs, "1,2", or processes of one thread, with --batch_sizes images on
            each.
        callbacks: Instead: what the callbacks of frcnn fit add to its steps and validations, in float32; by default of
            experiments/voc12_subset_mobilenet_v2.yaml and one image.
    """

    kind: ClassVar[Literal["train", "infer"]] = "train"
    devices: list[int] | None = None
    callbacks: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if (self.sweep is not None) + (self.devices is not None) + self.callbacks > 1:
            raise InputError("--sweep, --devices and --callbacks: give one of them")


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(FormatOptions):
    """Time the training loader, beside VOCDetection with transforms.v2.

    Args:
        data: One split of a VOC year.
        images: The first of the split.
        batch_size: Images per batch.
        workers: Worker processes of each loader.
        repeats: Epochs of each, in turn.
    """

    kind: ClassVar = "data"
    data: DataOptions = field(metadata=some_of(required=("root", "train_splits")))
    images: int = 500
    batch_size: int = 4
    workers: int = 2
    repeats: int = 5

    def __post_init__(self) -> None:
        """Check all numbers."""
        check_least(self, images=1, batch_size=1, workers=0, repeats=1)


@dataclass(frozen=True, kw_only=True)
class MetricsOptions(FormatOptions):
    """Time the metrics, beside torchmetrics.

    Args:
        images: Number of images; as VOC2007 test.
        detections: Per image.
        repeats: Of our metrics; the peer runs once.
    """

    kind: ClassVar = "evaluate"
    images: int = 4952
    detections: int = 100
    repeats: int = 3

    def __post_init__(self) -> None:
        """Check all numbers."""
        check_least(self, images=1, detections=1, repeats=1)
