"""4-step alternating training (Ren et al. 2015, section 3.2): two networks at first, one with shared layers at the end.

1. The RPN, with a backbone of its own, from the initial (ImageNet) weights.
2. The detector on step 1's proposals, with its own backbone, from the initial weights again.
3. The RPN once more, on step 2's backbone, which is fixed from here on.
4. The detector's own layers on step 3's proposals.

Step 1's network is the `proposer`, beside the detector until step 2 has ended; from step 3 on there is nothing but the
`FasterRCNN` of joint training, with the same tensor names. Proposals are computed as they are needed: from a fixed RPN
they are those that the published code stores between its steps.

The steps are counted in optimiser steps, not epochs, as in the published settings (80,000, 40,000, 80,000 and 40,000):
so the shares hold for a training of any length, also one of fewer than four epochs or one without a number of epochs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageBatch, all_to_original, drawn_scales, ground_truth, make_batch
from detector.training.joint import JointTraining, SchemeName
from detector.training.lightning_private import forget_logged
from detector.training.optimization import AveragedWeights

STEPS = (
    "the RPN with a backbone of its own",
    "the detector on step 1's proposals",
    "the RPN on step 2's backbone",
    "the detector's own layers on step 3's proposals",
)


@dataclass
class AlternatingConfig:
    """Options of the training scheme `alternating` alone.

    Args:
        step_shares: Shares of all optimiser steps that the four steps get: positive numbers, of which only the
            proportions count. py-faster-rcnn: [80000, 40000, 80000, 40000].
        restart_backbone: Step 2 begins with the initial backbone (the paper), or goes on with that of step 1. The
            paper's is pretrained; of random weights, which step 1 has trained meanwhile, a restart has no use.
        restart_rpn: Step 3 begins with new RPN layers (py-faster-rcnn), or goes on with those of step 1.
    """

    step_shares: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.25, 0.25])
    restart_backbone: bool = True
    restart_rpn: bool = True

    def __post_init__(self) -> None:
        if len(self.step_shares) != len(STEPS):
            raise InputError(
                f"alternating.step_shares: {self.step_shares} has {len(self.step_shares)} numbers; "
                f"give {len(STEPS)}, one per step"
            )
        if not all(0 < share < math.inf for share in self.step_shares):
            raise InputError(f"alternating.step_shares: {self.step_shares} must be positive numbers")


def step_ends(shares: Sequence[float], total: int) -> list[int]:
    """Return how many of `total` optimiser steps are done when each of the four steps ends."""
    return [round(total * (sum(shares[:count]) / sum(shares))) for count in range(1, len(shares) + 1)]


class Proposer(nn.Module):
    """The network of step 1: an RPN with a backbone of its own, copies of the detector's initial ones."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.backbone = deepcopy(model.backbone)
        self.rpn = deepcopy(model.rpn)


class AlternatingTraining(nn.Module, JointTraining):
    """Four steps after one another, each of which trains some layers on its own losses and proposals.

    What the step at work does not train has no gradients, and fixed backbones are in evaluation mode. (A fixed RPN is
    not: its mode says how many proposals it makes, and nothing else.)

    Args:
        model: The detector, with its initial weights. A module that has both registers this one after it, because
            `train` here has the last word on the backbone's mode.
        config: Lengths of the steps.

    Attributes:
        step: The step at work, 1 to 4.
        ends: Optimiser steps after which the steps end; empty until a training has begun.
        proposer: The network of step 1, in steps 1 and 2.
    """

    name: SchemeName = "alternating"

    def __init__(self, model: FasterRCNN, config: AlternatingConfig) -> None:
        super().__init__()
        self.config = config
        self.step = 1
        self.ends: list[int] = []
        self.proposer: Proposer | None = Proposer(model)
        self._model = (model,)
        self._trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._fix()

    @property
    def detects(self) -> bool:
        """Return whether step 1 is over."""
        return self.step > 1

    @property
    def is_final(self) -> bool:
        """Return whether the last step is at work."""
        return self.step == len(STEPS)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the detector's backbone, too; fixed backbones stay in evaluation mode."""
        super().train(mode)
        self.model.backbone.train(mode and self.step == 2)
        if self.proposer is not None:
            self.proposer.backbone.train(mode and self.step == 1)
        return self

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the two losses of the network at work and their weighted sum."""
        model = self.model
        batch = make_batch(images, model.image_config, model.training, drawn_scales(targets))
        truths = ground_truth(targets, batch)
        if self.step in (1, 3):
            network = self.proposer or model
            output = network.rpn(network.backbone(batch.tensors))
            return model.with_total(network.rpn.losses(output, batch, truths, model.difficult))
        proposals, features = self._propose(batch)
        if self.proposer is not None:
            features = model.backbone(batch.tensors)
        return model.with_total(model.roi_heads.training_losses(features, proposals, batch, truths, model.difficult))

    def detect(self, images: Sequence[Tensor]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Return detections and proposals of the networks that there are.

        Step 1 has no detector, and no detections; in step 2 they come from step 1's proposals, from step 3 on from the
        one network, in step 3 with step 2's detector.
        """
        if self.proposer is None:
            return super().detect(images)
        batch = make_batch(images, self.model.image_config, self.training)
        proposals, features = self._propose(batch)
        if self.step == 1:
            nothing = {"boxes": features[0].new_zeros(0, 4).float(), "scores": features[0].new_zeros(0).float()}
            detections = [nothing | {"labels": nothing["scores"].long()} for _ in images]
        else:
            detections = self.model.detect(self.model.backbone(batch.tensors), proposals, batch)
        return detections, all_to_original(proposals, batch)

    def _propose(self, batch: ImageBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Return the proposals of each image by the RPN that there is, and the features of its backbone."""
        network = self.proposer or self.model
        features = network.backbone(batch.tensors)
        return network.rpn.proposals(network.rpn(features), batch), features

    def logged(self) -> Mapping[str, float]:
        """Return the step at work."""
        return {"train/alternating_step": float(self.step)}

    # From step to step

    def check_endless(self) -> None:
        """Raise InputError, because where the steps end is a share of the length."""
        raise InputError("alternating training needs its length: give trainer.max_epochs or trainer.max_steps")

    def steps(self, trainer: pl.Trainer) -> int:
        """Fix where the steps end, and return how many optimiser steps the one at work has.

        Raises:
            InputError: The training is endless or too short, ends elsewhere than the one it goes on with, or runs on a
                strategy that shards the network.
        """
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError("trainer.strategy: alternating training works on one device or with ddp")
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            self.check_endless()
        ends = step_ends(self.config.step_shares, int(total))
        if self.ends and self.ends != ends:
            raise InputError(
                f"{trainer.ckpt_path}: the steps of its alternating training end at {self.ends} optimiser steps, here "
                f"at {ends}; go on with the same step_shares, number of epochs or steps, batches and devices"
            )
        lengths = [end - start for start, end in pairwise((0, *ends))]
        if min(lengths) < 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                f"alternating.step_shares: {self.config.step_shares} of {total} optimiser steps leave the four steps "
                f"{lengths}; each needs at least 1: train longer"
            )
        self.ends = ends
        return lengths[self.step - 1]

    def start(self) -> None:
        """Say which step begins or goes on."""
        start, end = (0, *self.ends)[self.step - 1 : self.step + 1]
        rank_zero_info(
            f"Alternating training, step {self.step} of {len(STEPS)}: {STEPS[self.step - 1]}; optimiser steps {start} "
            f"to {end}"
        )

    def advance(self, module: pl.LightningModule) -> None:
        """Go on to the next step once the one at work has had its optimiser steps.

        Not earlier: a validation after its last one is of the finished step. The new step has its own optimiser,
        schedule and weight averages, and begins from the averaged weights, those that were validated.
        """
        trainer = module.trainer
        if not self._is_over(trainer):
            return
        averaged = _averages(trainer)
        for averages in averaged:
            averages.on_train_end(trainer, module)
        module.zero_grad(set_to_none=True)
        while self._is_over(trainer):
            self._enter(self.step + 1)
        for averages in averaged:
            averages.setup(trainer, module, "fit")
        if isinstance(trainer.strategy, DDPStrategy):
            rebuild_ddp(trainer.strategy, module)
        trainer.strategy.setup_optimizers(trainer)
        forget_logged(trainer)
        self.start()

    def _is_over(self, trainer: pl.Trainer) -> bool:
        return not self.is_final and trainer.global_step >= self.ends[self.step - 1]

    def _enter(self, step: int) -> None:
        if step == 2 and self.proposer is not None and not self.config.restart_backbone:
            self.model.backbone.load_state_dict(self.proposer.backbone.state_dict())
        if step == 3 and self.proposer is not None and not self.config.restart_rpn:
            self.model.rpn.load_state_dict(self.proposer.rpn.state_dict())
        self.step = step
        if step > 2:
            self.proposer = None
        self._fix()

    def _fix(self) -> None:
        """Let the step's own parameters have gradients, but for frozen stages; set the modes of the backbones."""
        model, proposer = self.model, self.proposer
        trained: tuple[nn.Module, ...] = {
            1: (proposer or model,),
            2: (model.backbone, model.roi_heads),
            3: (model.rpn,),
            4: (model.roi_heads,),
        }[self.step]
        own = {id(parameter) for part in trained for parameter in part.parameters()}
        for network in (model, proposer):  # with equal names
            for name, parameter in network.named_parameters() if network is not None else ():
                parameter.requires_grad_(name in self._trainable and id(parameter) in own)
        self.train(self.training)

    # Checkpoints

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the step at work, and where the steps end."""
        checkpoint["alternating"] = {"step": self.step, "ends": list(self.ends)}

    def restore(self, checkpoint: Mapping[str, Any], module: pl.LightningModule | None = None) -> None:
        """Go to the step of a checkpoint; one of joint training has the whole network."""
        record = checkpoint.get("alternating") or {"step": len(STEPS), "ends": []}
        self.ends = list(record["ends"])
        if record["step"] < 3 and self.proposer is None:
            self.proposer = Proposer(self.model)
        self._enter(record["step"])
        if module is not None:
            for averages in _averages(module.trainer):
                averages.setup(module.trainer, module, "fit")

    def check_whole(self, path: object) -> None:
        """Raise InputError in steps 1 and 2."""
        if self.proposer is not None:
            raise InputError(
                f"{path}: is of step {self.step} of an alternating training; up to the end of step 2 there is no "
                "single network that detects"
            )


def rebuild_ddp(strategy: DDPStrategy, module: pl.LightningModule) -> None:
    """Let DDP exchange the gradients of the parameters that have one now; it knows those that had when it was built.

    Lightning builds it on a CUDA stream of its own, where it broadcasts weights that are still being written on the
    usual stream, and that are read there next.
    """
    strategy.model = module
    wait: Callable[[], None] = torch.cuda.synchronize if strategy.root_device.type == "cuda" else lambda: None
    wait()
    strategy.configure_ddp()
    wait()


def _averages(trainer: pl.Trainer) -> list[AveragedWeights]:
    """Return the averages, for which each step is a training of its own."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, AveragedWeights)]
