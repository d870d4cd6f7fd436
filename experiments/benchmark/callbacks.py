"""`frcnn benchmark train --callbacks`: what the callbacks cost that every training has without being asked.

It is one training on random images, of which every other step and every other validation runs without them, so that
whatever else the machine does befalls both. Each callback is also timed by itself; what it makes the detector keep for
it, and what a GPU computes for it later, shows in the difference alone.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, Final, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler
from torch.utils.data import DataLoader, Dataset

from detector.training.callbacks.run_files import RunFiles
from detector.training.callbacks.validation_pictures import IMAGES_BETWEEN
from detector.training.lightning_module import FasterRCNNModule
from detector.training.loggers import RunTensorBoard
from detector.training.optimization import OptimizerConfig
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.measuring import CPU, Parts, device_name, synchronize
from experiments.benchmark.models import CLASSES, OBJECTS, Batch, Network, build_network, chosen_networks, make_images
from experiments.benchmark.network import case_name
from experiments.benchmark.options import TrainOptions
from experiments.benchmark.programs import PACKAGES, Setting, chosen_setting
from experiments.run.callbacks import training_callbacks
from experiments.run.host_memory import keep_freed_memory

IMAGES: Final = 50  # of a validation
EPOCHS: Final = 6  # every other one validated without callbacks; of three others the first and the last are drawn
STEPS_OF_A_ROUND: Final = 40
LOG_EVERY: Final = 20  # steps, as `frcnn fit` does
DEFAULT: Final = Path(__file__).parents[1] / "voc12_subset_mobilenet_v2.yaml"


class Timed(NamedTuple):
    """How long a step or a validation took, whether there were callbacks, and how long each of them took, in ms."""

    kind: str
    milliseconds: float
    on: bool
    parts: Parts


class Turns(Profiler):
    """Take the callbacks from every other step and validation of a training, and time all that Lightning runs.

    Once half of the steps are done, the others get them, so that each of two halves has steps of all numbers.

    Attributes:
        done: Steps and validations in their order.
        trainer: The one that runs it.
    """

    trainer: pl.Trainer

    def __init__(self, device: torch.device, steps: int) -> None:
        super().__init__()
        self.device, self.steps = device, steps
        self.done: list[Timed] = []
        self._callbacks: list[pl.Callback] = []
        self._running: tuple[str, float, Parts] | None = None
        self._began: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Note what begins."""
        if action_name.endswith(".train_dataloader_next"):
            self._begin("step")
        elif action_name.endswith(".on_validation_model_eval"):
            self._begin("validation")
        elif action_name.endswith(".on_train_end"):
            self._end()
        self._began[action_name] = perf_counter()

    def stop(self, action_name: str) -> None:
        """Add up what a callback took."""
        if action_name.startswith("[Callback]") and self._running is not None:
            parts, name = self._running[2], action_name.removeprefix("[Callback]").split(".")[0]
            parts[name] = parts.get(name, 0.0) + 1000 * (perf_counter() - self._began[action_name])

    def summary(self) -> str:
        """Return nothing: what was timed is in `done`."""
        return ""

    def _begin(self, kind: str) -> None:
        self._end()
        self._callbacks = self._callbacks or self.trainer.callbacks  # type: ignore[attr-defined]
        number = sum(one.kind == kind for one in self.done)
        late = kind == "validation" or number >= self.steps / 2
        self.trainer.callbacks = self._callbacks if number % 2 == late else []  # type: ignore[attr-defined]
        self._running = kind, perf_counter(), {}

    def _end(self) -> None:
        if self._running is not None:
            synchronize(self.device)
            kind, began, parts = self._running
            on = bool(self.trainer.callbacks)  # type: ignore[attr-defined]
            self.done.append(Timed(kind, 1000 * (perf_counter() - began), on, parts))
            self._running = None


class Images(Dataset[Any]):
    """Images with their targets, as a dataset that validations may draw."""

    def __init__(self, batch: Batch) -> None:
        self.images, self.targets = batch
        self.file_names = [f"{index}.jpg" for index in range(len(self.images))]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return an image (3, H, W) and its target."""
        return self.images[index], self.targets[index] | {"file_name": self.file_names[index]}


def benchmark_callbacks(options: TrainOptions) -> Benchmark:
    """Time steps and validations with the usual callbacks and without, for each network and number of images."""
    if options.networks is None and options.config is None:
        options = replace(options, config=str(DEFAULT))
    networks, setting = chosen_networks(options), chosen_setting(options)
    title = "the usual callbacks of a training in milliseconds, of networks with random weights"
    benchmark = Benchmark(title, device_name(setting.device), PACKAGES, progress=True)
    for network in networks:
        for number in setting.batch_sizes:
            step, plain, drawn = _cases(case_name(network, "32-true", number), _train(network, number, setting))
            for case in (step, plain, drawn):
                benchmark.add(case)
            between = math.ceil(IMAGES_BETWEEN / IMAGES)
            mean = plain.ours_ms + (drawn.ours_ms - plain.ours_ms) / between
            more = [100 * (ours / (of.peer_ms or ours) - 1) for ours, of in ((step.ours_ms, step), (mean, plain))]
            benchmark.notes.append(
                f"{step.name.removesuffix(', step')}: callbacks add {more[0]:.1f} % to a step and {more[1]:.1f} % to "
                f"validations, of which one in {between} is drawn"
            )
    return benchmark


def _train(network: Network, number: int, setting: Setting) -> list[Timed]:
    images = Images(make_images(network.size, IMAGES, OBJECTS, CPU))
    steps = STEPS_OF_A_ROUND * setting.repeats // EPOCHS
    turns = Turns(setting.device, steps * EPOCHS)
    keep_freed_memory(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        turns.trainer = pl.Trainer(
            accelerator=setting.device.type,
            devices=1,
            precision="32-true",
            max_epochs=EPOCHS,
            num_sanity_val_steps=0,
            log_every_n_steps=LOG_EVERY,
            logger=RunTensorBoard(folder, "", ""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RunFiles(folder), *training_callbacks(Path(folder), LOG_EVERY)],
            profiler=turns,
        )
        batches = [[(step * number + one) % IMAGES for one in range(number)] for step in range(steps)]
        singly = [[index] for index in range(IMAGES)]
        training, validation = (
            DataLoader(images, batch_sampler=order, collate_fn=_collate) for order in (batches, singly)
        )
        turns.trainer.fit(_module(network, images), training, validation)
    return turns.done


def _collate(samples: Any) -> Any:
    return tuple(map(list, zip(*samples, strict=True)))


def _module(network: Network, images: Images) -> FasterRCNNModule:
    model, backbone = build_network(network, (images.images[:1], images.targets[:1]))
    module = FasterRCNNModule(
        [f"class {number}" for number in range(CLASSES)],
        backbone,
        network.anchors,
        network.rpn,
        network.roi,
        network.image,
        OptimizerConfig(lr=1e-8),
        network.difficult,
        load_backbone_weights=False,
    )
    module.model.load_state_dict(model.state_dict())
    return module


def _cases(name: str, done: Sequence[Timed]) -> Iterator[Case]:
    """Yield a step, a validation that is not drawn, and one that is, with callbacks and without."""
    steps = [one for one in done if one.kind == "step"][EPOCHS:]  # the first ones warm up
    validations = [one for one in done if one.kind == "validation"]
    without = [one for one in validations[2:] if not one.on]
    first, *others, last = (one for one in validations if one.on)
    for what, with_callbacks, alone in (
        ("step", [one for one in steps if one.on], [one for one in steps if not one.on]),
        (f"validation of {IMAGES} images", others, without),
        (f"validation of {IMAGES} images with pictures", [first, last], without),
    ):
        mean = fmean(one.milliseconds for one in with_callbacks)
        sums: Parts = {}
        for one in with_callbacks:
            for part, spent in one.parts.items():
                sums[part] = sums.get(part, 0.0) + spent / len(with_callbacks) / mean
        parts = {part: share for part, share in sorted(sums.items(), key=lambda item: -item[1]) if share >= 0.0005}
        yield Case(f"{name}, {what}", mean, fmean(one.milliseconds for one in alone), parts, "without")
