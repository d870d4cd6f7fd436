"""How strongly each part of the detector is pulled: norms of its gradients."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from detector.training.callbacks.inside_steps import log_scalars

PARTS = ("backbone", "rpn", "box_head", "predictor")


class GradientNorms(pl.Callback):
    """Log the L2 norm of the gradients before they are clipped, as `weights/gradient_norm/<part>` and `.../all`.

    Parts are the backbone, the RPN, the box head and the predictor behind it; those that are frozen, or not trained in
    a step of alternating training, are left out. `all` is what `trainer.gradient_clip_val` is compared with. Costs
    one pass over the gradients, and one transfer to the host, in steps that are logged; others cost nothing.

    Args:
        every_n_steps: How often, in optimiser steps; 0: never.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log; Lightning calls this on gradients that are whole, averaged over processes, unscaled and not clipped."""
        step = trainer.global_step + 1
        if not self.every_n_steps or step % self.every_n_steps or not trainer.is_global_zero:
            return
        gradients: dict[str, list[Tensor]] = {}
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                part = next((part for part in name.split(".") if part in PARTS), "other")
                gradients.setdefault(part, []).append(parameter.grad)
        norms = {part: nn.utils.get_total_norm(of_part) for part, of_part in gradients.items()}
        if norms:
            parts = torch.stack(list(norms.values()))
            values = torch.cat((parts, parts.norm()[None])).tolist()
            names = (f"weights/gradient_norm/{part}" for part in (*norms, "all"))
            log_scalars(trainer, dict(zip(names, values, strict=True)), step - 1)
