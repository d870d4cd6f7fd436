"""How long a training will take on this machine, told from a few steps that are timed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from experiments.benchmark.measuring import median_times, this_device
from experiments.benchmark.models import OBJECTS, build_network, chosen_networks, make_images
from experiments.benchmark.options import TrainOptions
from experiments.benchmark.programs import Setting, our_program, ready
from experiments.run.precision import automatic_precision

WHOLE: Final = (1.5, 2.4)
"""A training also reads and augments, averages weights, logs and validates: 1.7 to 1.9 times its steps, measured."""


@dataclass(frozen=True)
class Expectation:
    """A training, as far as its time is concerned.

    Attributes:
        steps: How many there are.
        seconds: Of one step.
        precision: In which it is computed, and why.
    """

    steps: int
    seconds: float
    precision: str

    @property
    def minutes(self) -> tuple[float, float]:
        """Return the least and the most that all of the training will take."""
        low, high = (self.steps * factor * self.seconds / 60 for factor in WHOLE)
        return low, high

    def __str__(self) -> str:
        """Return what the minutes are told from."""
        return f"{self.steps} steps of {1000 * self.seconds:.0f} ms in {self.precision}"


def expect_training(config: Path, images: int) -> Expectation:
    """Return what to expect of the training of a config on so many images, from steps of the same network timed now."""
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    batch_size, epochs = options["data"]["batch_size"], options["trainer"]["max_epochs"]
    precision, reason = automatic_precision(this_device().type)
    seconds = seconds_per_step(config, batch_size, precision)
    return Expectation(epochs * max(images // batch_size, 1), seconds, f"{precision}, since {reason}")


def seconds_per_step(config: Path, batch_size: int, precision: str) -> float:
    """Return the median time of a training step of a config's network on random images."""
    (network,) = chosen_networks(TrainOptions(config=str(config)))
    setting = Setting("train")
    batch = make_images(network.size, batch_size, OBJECTS, setting.device)
    program = our_program(ready(build_network(network, batch)[0], setting), batch, precision, setting)
    return median_times([program], setting.device, repeats=5, seconds=1.0)[0] / 1000
