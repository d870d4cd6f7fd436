"""Dynamic R-CNN (Zhang 2020, arXiv 2004.06002): RoIs' IoU threshold and smooth L1's beta follow the training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, distributed, nn

from detector.assignment.matching import Around, ThresholdMatcher
from detector.errors import InputError
from detector.losses import BoxLoss, SmoothL1
from detector.sampling import GroundTruth, Matches, SampledRoIs

_NO_BETA = 1e-15
"""A beta that is no larger would be due to objects among the RoIs alone."""


class DynamicMatcher(ThresholdMatcher, nn.Module):
    """Match RoIs by an IoU that rises as proposals get better, and lower smooth L1's beta (Dynamic R-CNN, Zhang 2020).

    After every `interval` steps the threshold between background and objects becomes the mean, over the images of these
    steps, of the `iou_rank`-th highest IoU of an image's RoIs, but at least `initial_iou`; images without objects do
    not count. And beta becomes the median, over these steps, of the `target_rank`-th smallest target (per image of a
    batch) of positive RoIs, but at most `initial_beta`; a target is the mean of |dx| and |dy| in units of
    `roi.delta_std`. Only `roi.reg_loss` smooth_l1 has a beta.

    The processes of a training average what they see in every step, so all have the same values (in the authors' code
    each has its own). What was seen is in checkpoints, so a resumed training goes on to the bit.

    Args:
        iou_rank: 75 in the paper, K_I, of about 2000 proposals of an image.
        target_rank: 10 in the paper, K_beta.
        interval: 100 steps in the paper, C; batches whose gradients are accumulated count one by one.
        initial_iou: The first threshold, and the lowest: 0.4 in the paper.
        initial_beta: The first beta, and the highest: 1 in the paper.
        background_from: Lower bound of the IoU of background.
    """

    _history: Tensor  # (2, interval): IoU and target of each step since the last change, -1 where there was none
    _values: Tensor  # (2,): threshold and beta
    _steps: Tensor

    def __init__(
        self,
        iou_rank: int = 75,
        target_rank: int = 10,
        interval: int = 100,
        initial_iou: float = 0.4,
        initial_beta: float = 1.0,
        background_from: float = 0.0,
    ) -> None:
        super().__init__()
        if min(iou_rank, target_rank, interval) < 1 or not 0 <= background_from < initial_iou < 1 or initial_beta <= 0:
            raise InputError(
                "roi.matcher: needs iou_rank, target_rank and interval from 1 on, 0 <= background_from < initial_iou "
                "< 1, and initial_beta (roi.reg_beta by default) above 0"
            )
        self.iou_rank, self.target_rank, self.interval = iou_rank, target_rank, interval
        self.initial_iou, self.initial_beta, self.background_from = initial_iou, initial_beta, background_from
        self.register_buffer("_history", torch.full((2, interval), -1.0))
        self.register_buffer("_values", torch.tensor([initial_iou, initial_beta]))
        self.register_buffer("_steps", torch.tensor(0))
        self._known: tuple[int, float, float] | None = None  # steps and values, without waiting for a GPU
        self._ranked = torch.tensor(-1.0)
        forget: Any = self.register_load_state_dict_post_hook
        forget(lambda module, _: setattr(module, "_known", None))

    @property
    def known(self) -> tuple[int, float, float]:
        """Return the steps since the training began, the threshold and beta."""
        if self._known is None:
            self._known = (int(self._steps), *self._values.tolist())
        return self._known

    def bounds(self) -> tuple[float, float, float]:
        """Return the threshold, and the bounds of background below it; see `ThresholdMatcher`."""
        _, iou, _ = self.known
        return iou, self.background_from, iou

    def box_loss(self, given: BoxLoss) -> BoxLoss:
        """Return smooth L1 with the beta of now; see `Matcher`.

        Raises:
            InputError: It is another loss.
        """
        if not isinstance(given, SmoothL1):
            raise InputError("roi.matcher: dynamic changes the beta of smooth L1; it needs roi.reg_loss smooth_l1")
        return replace(given, beta=self.known[2])

    def logged(self) -> Mapping[str, float]:
        """Return the threshold and beta; see `Matcher`."""
        _, iou, beta = self.known
        return {"train/roi_positive_iou": iou, "train/roi_reg_beta": beta}

    def of_images(
        self, candidates: Sequence[Tensor], truths: Sequence[GroundTruth], treatment: str, around: Sequence[Around]
    ) -> list[Matches]:
        """Return the matches of the RoIs of each image, and see how good these are in training; see `Matcher`."""
        matches = super().of_images(candidates, truths, treatment, around)
        if self.training:
            best = [found.iou.topk(min(self.iou_rank, len(found.iou))).values for found in matches if len(found.iou)]
            highest, ranked = torch.stack([values[[0, -1]] for values in best] or [self._values * 0]).T
            has_objects = highest > 0
            self._ranked = ((ranked * has_objects).sum() / has_objects.sum()).where(has_objects.any(), -1.0)
        return matches

    @torch.no_grad()
    def learn(self, sampled: Sequence[SampledRoIs]) -> None:
        """Add what a training step has seen, and change the values where that is due; see `Matcher`."""
        if not self.training:
            return
        positive = torch.cat([rois.labels for rois in sampled]) > 0
        targets = torch.cat([rois.deltas[:, :2] for rois in sampled]).abs().mean(dim=1)
        ordered = torch.cat((targets.where(positive, torch.inf).sort().values, targets.new_full((1,), torch.inf)))
        last = positive.sum().clamp(max=self.target_rank * len(sampled)) - 1
        target = ordered.gather(0, last.clamp(min=0)[None])[0].where(last >= 0, -1.0)
        seen = torch.stack((self._ranked, target))
        if distributed.is_available() and distributed.is_initialized():
            there = (seen >= 0).to(seen.dtype)
            sums, counts = (both := torch.cat((seen * there, there))).split(2)
            distributed.all_reduce(both)
            seen = (sums / counts).where(counts > 0, -1.0)
        steps, iou, beta = self.known
        self._history[:, steps % self.interval] = seen
        self._steps += 1
        if (steps + 1) % self.interval == 0:
            ious, targets_seen = ([value for value in row if value >= 0] for row in self._history.tolist())
            iou = max(self.initial_iou, mean(ious)) if ious else iou
            middle = median(targets_seen) if targets_seen else 0.0
            beta = min(self.initial_beta, middle) if middle > _NO_BETA else beta
            self._values.copy_(torch.tensor((iou, beta)))
            iou, beta = self._values.tolist()  # as in a checkpoint
        self._known = steps + 1, iou, beta
