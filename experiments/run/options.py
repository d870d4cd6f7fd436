"""The options of `frcnn predict`, and those of `frcnn fit`, `validate` and `test` beside Lightning's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detector.errors import InputError
from detector.files import check_checkpoint
from experiments.arguments import DataOptions, ScoreOptions, check_least, positional, some_of
from experiments.dataset.data_format import DataFormatOptions


@dataclass(frozen=True, kw_only=True)
class RunOptions(DataFormatOptions):
    """Train a detector.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save last.ckpt at the end of the step, or within a validation, and end
    with 128 and the signal's number (130 after Ctrl-C); a second Ctrl-C, and five minutes without the end of a batch,
    end without saving. In a job of SLURM: #SBATCH --requeue --signal=USR1@120, and srun --kill-on-bad-exit frcnn fit
    ... --run_name NAME --ckpt_path last: the job saves two minutes before its time is over, goes back into the queue,
    and goes on from there.

    Args:
        runs_dir: Folder of all runs; by default runs. With --ckpt_path, another runs_dir, experiment or run_name than
            the checkpoint's makes a new run, which starts where the checkpoint stands.
        experiment: Name of the experiment's folder; by default that of the config file.
        run_name: Name of the run's folder; by default seed<N>, numbered.
        save_every_minutes: In the middle of an epoch last.ckpt is saved too when it is older than that; 0: never.
        resume_changed: With --ckpt_path, go on although options differ from the checkpoint's; those given now count. To
            begin a new training with the weights of a checkpoint alone, give --model.weights CKPT instead.
    """

    runs_dir: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    save_every_minutes: float = 10.0
    resume_changed: bool | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluate a checkpoint.

    Args:
        classes: Evaluate these classes alone, as if there were no others; the results go to the folder classes/<names>
            of the run, so that its own numbers stay.
        results_dir: Folder for metrics.json, predictions.json and TensorBoard events; by default that of the
            checkpoint's run; a validation with other options of data or model goes to evaluations/<options> there.
    """

    classes: list[str] | None = None
    results_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(EvaluationOptions):
    """Evaluate a checkpoint on the validation splits.

    Args:
        oracle: Also tell what AP would be if a part were right, each alone: proposals (the objects' boxes instead of
            the RPN's), labels or boxes (of the objects that detections lie on); all, or a list of them. Written into
            oracles.json beside metrics.json. Proposals take as long again as the validation.
    """

    oracle: list[Literal["proposals", "labels", "boxes", "all"]] | None = None


@dataclass(frozen=True, kw_only=True)
class TestOptions(EvaluationOptions):
    """Evaluate a checkpoint on the test splits.

    Args:
        save_devkit_results: Folder for the detections as the VOC devkit reads them: comp4_det_test_<class>.txt.
    """

    save_devkit_results: str | None = None


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ScoreOptions):
    """Detect objects in images with a trained checkpoint.

    Images are read as in training, and upright where a camera stored them turned (EXIF): boxes refer to the upright
    image. Of an animation the first picture counts. An image that cannot be read is named and left out, and the exit
    status is then 1. No file is overwritten but those of an earlier prediction. What is found is kept on disk image by
    image: the same command goes on where it was stopped or killed.

    Args:
        ckpt_path: Checkpoint of frcnn fit, the folder of its run, or what frcnn export wrote, a file or its folder;
            nothing else is needed.
        images: An image, a folder, a pattern in quotes ("photos/**/*.png"), a text file with a path in each line, a
            video, of which each frame is an image, or a camera (camera:0, rtsp://...).
        max_images: Detect in the first so many; by default in all, of a camera's frames in 1,000.
        output: Folder for what is saved; annotated images keep their folders.
        save: What is saved: images (annotated), json (predictions.json, COCO results), csv (predictions.csv), devkit
            (comp4_det_test_<class>.txt), and for labelling voc (Annotations/*.xml) and yolo (labels/*.txt,
            classes.txt). json, csv and devkit hold all detections, the others those from score_threshold on.
        classes: Detect these classes alone.
        batch_size: Images at a time.
        num_workers: Threads that read images while others are detected in.
        accelerator: As Lightning's: auto, cpu, gpu, ...
        precision: As Lightning's: 32-true, bf16-mixed, ..., or auto.
        flip: Also detect on the mirrored image, and merge.
        shortest_sides: Detect at several sizes, and merge: "[480, 600]".
        tile: Detect in larger images tile by tile, each so many pixels high and wide, and merge: 640.
        tile_overlap: Share of a tile that it has in common with its neighbour; objects should not be larger.
        data: How images are read.
    """

    ckpt_path: str
    images: str
    output: str
    save: list[Literal["images", "json", "voc", "csv", "devkit", "yolo"]] = field(
        default_factory=lambda: ["images", "json"]
    )
    classes: list[str] | None = None
    max_images: int | None = None
    batch_size: int = 1
    num_workers: int = 2
    accelerator: str = "auto"
    precision: str = "32-true"
    flip: bool = False
    shortest_sides: list[int] | None = None
    tile: int | None = None
    tile_overlap: float = 0.2
    data: DataOptions = field(default_factory=DataOptions, metadata=some_of("bit_depth", "max_pixels"))

    def __post_init__(self) -> None:
        """Refuse a batch without images, and tiles that cover none."""
        super().__post_init__()
        check_least(self, max_images=1, batch_size=1, num_workers=0, tile=16)


def check_prediction(options: PredictOptions) -> None:
    """Refuse a checkpoint that is not there; of a run's folder it is looked for later."""
    if not Path(options.ckpt_path).is_dir():
        check_checkpoint(options.ckpt_path)


@dataclass(frozen=True)
class ReplayOptions:
    """Run a step again whose loss or gradient was not finite, and tell where it ceases to be.

    A training that ends there writes the batches of the step, the weights before it and the seed of its draws into the
    run's folder. Losses are printed beside those of the run, with the first layer whose output is not finite, and what
    PyTorch's anomaly detection finds in the gradients. They are the same where the device is of the same kind.

    Args:
        dump: The file, nonfinite_step<N>.pt.
    """

    dump: str = field(metadata=positional("DUMP"))


def check_dump(options: ReplayOptions) -> None:
    """Refuse a file that is not there."""
    if not Path(options.dump).is_file():
        raise InputError(f"{options.dump}: no such file")
