"""FasterRCNNModule: the detector under Lightning, with its losses, its metrics, its optimiser and its randomness."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.backbones.box_heads import BoxPredictor
from detector.errors import InputError, brief
from detector.faster_rcnn import LOSS_NAMES, Difficult, FasterRCNN
from detector.image_batch import ImageConfig
from detector.kernels.cpu_paths import CpuKernels, check_cpu_kernels, use_cpu_kernels
from detector.kernels.parts import OPTIMIZER, part
from detector.kernels.transfers import constant
from detector.metrics import DetectionAP, ProposalRecall
from detector.metrics.class_subset import chosen_classes
from detector.metrics.proposal_recall import reachable
from detector.parts import options_of
from detector.roi_heads import RoIConfig
from detector.rpn import RegionProposalNetwork, RPNConfig
from detector.training.alternating import AlternatingConfig, AlternatingTraining
from detector.training.checkpoint_content import (
    bit_depth_of,
    check_bit_depth,
    check_classes,
    check_state,
    read_checkpoint,
)
from detector.training.compilation import CompileMode, check_compile_mode, compilable, compile_networks
from detector.training.finite import FiniteLosses, check_finite, spoilt
from detector.training.joint import JointTraining, SchemeName
from detector.training.lightning_private import trainer_of
from detector.training.optimization import (
    AveragedWeights,
    OptimizerConfig,
    build_optimizer,
    lr_factor,
    lr_scale,
    parameter_groups,
    say_lr,
    share_of_step,
)
from detector.training.resuming import check_resumption, let_options_count
from detector.translation.foreign_checkpoints import load_detector
from detector.translation.translated import Predictor

Batch = tuple[list[Tensor], list[dict[str, Any]]]
C = TypeVar("C")


class FasterRCNNModule(pl.LightningModule):
    """Faster R-CNN with approximate joint or 4-step alternating training.

    Args:
        class_names: Names of classes 1..C; the command line takes them from the data.
        backbone: Network, its weights, and what of it is frozen.
        anchors: Anchor shapes.
        rpn: Region proposal network.
        roi: RoI heads and post-processing.
        image: Size and normalisation.
        optimizer: Optimiser and schedule.
        difficult: What objects marked difficult are in training: `drop`, `keep`, or `ignore` (neither positive nor
            negative). Evaluation always follows the devkit: they count neither way.
        weights: A whole detector's weights to start from, instead of `backbone.weights`: a checkpoint of this project
            (all that fits; averaged weights where there are), a file of torchvision's `fasterrcnn_resnet50_fpn`, `_v2`,
            `fasterrcnn_mobilenet_v3_large_fpn` or `_320_fpn`, or one that chenyuntc/simple-faster-rcnn-pytorch trained.
            The options must be those of its network, of a checkpoint those of its backbone.
        weights_predictor: Class scores and boxes of `weights`: `match` takes them over class by class where the file
            names all of the data's classes (a checkpoint; COCO's or VOC's), or names none and has as many, and leaves
            them at random otherwise; `by_name` takes the classes of the same name, and only the others are random;
            `random` takes none.
        load_backbone_weights: Whether `backbone.weights` and `weights` are read; set to false where a checkpoint
            follows.
        training_scheme: `joint` (approximate joint training: all four losses in every step) or `alternating` (the
            paper's four steps, each with its own optimiser and schedule).
        alternating: Lengths of the four steps, and what the second and third start from.
        compile: Whether backbone, RPN head and box head go through torch.compile in fit, validate and test: `none`,
            `default`, or `max-autotune`, which also searches for the fastest kernels. Compiling takes minutes at the
            start of a run; a checkpoint does not tell whether its network was compiled.
        cpu_kernels: How layers are computed on CPUs; results are the same up to rounding. `auto` is what is fastest
            with the processor's instructions; `onednn` uses oneDNN's own functions and, without gradients, Winograd's
            algorithm; `winograd` has that in training, too; `plain` is PyTorch's functions alone.
    """

    batch_seed = 0  # of what is random in the last training batch
    report_folder: Path | None = None  # for what may be written beside checkpoints

    def __init__(
        self,
        class_names: list[str],
        backbone: BackboneConfig = BackboneConfig(),
        anchors: AnchorConfig = AnchorConfig(),
        rpn: RPNConfig = RPNConfig(),
        roi: RoIConfig = RoIConfig(),
        image: ImageConfig = ImageConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        difficult: Difficult = "drop",
        weights: str | None = None,
        weights_predictor: Predictor = "match",
        load_backbone_weights: bool = True,
        training_scheme: SchemeName = "joint",
        alternating: AlternatingConfig = AlternatingConfig(),
        compile: CompileMode = "none",
        cpu_kernels: CpuKernels = "auto",
    ) -> None:
        super().__init__()
        check_compile_mode(compile)
        check_cpu_kernels(cpu_kernels)
        self.compile_mode = compile
        self.cpu_kernels = cpu_kernels
        # From a checkpoint the configs come back as the plain dicts that were saved.
        backbone, anchors = _config(BackboneConfig, backbone), _config(AnchorConfig, anchors)
        rpn, roi = _config(RPNConfig, rpn), _config(RoIConfig, roi)
        image, optimizer = _config(ImageConfig, image), _config(OptimizerConfig, optimizer)
        alternating = _config(AlternatingConfig, alternating)
        names = ("backbone", "anchors", "rpn", "roi", "image", "optimizer", "alternating")
        configs: tuple[Any, ...] = (backbone, anchors, rpn, roi, image, optimizer, alternating)
        self.save_hyperparameters(
            {
                "class_names": list(class_names),
                **{name: options_of(config) for name, config in zip(names, configs, strict=True)},
                "difficult": difficult,
                "training_scheme": training_scheme,
                "weights": weights,
                "weights_predictor": weights_predictor,
            },
            logger=False,  # `Hyperparameters` writes them
        )
        self.class_names = list(class_names)
        self.bit_depth = 16  # of the values in 16-bit images that it was trained on, by its checkpoint
        self.optimizer_config = optimizer
        self._other_optimizer: bool | None = None  # None: the optimiser is made by the options as they are
        self.last_losses: dict[str, Tensor] = {}
        source = replace(backbone, weights=weights or backbone.weights)  # so frozen layers are known not to be random
        load_weights = load_backbone_weights and weights is None
        self.model = FasterRCNN(
            len(class_names), source, anchors, rpn, roi, image, difficult, load_weights=load_weights
        ).to(memory_format=torch.channels_last)
        self.weights_report = self.model.backbone.weights_report
        if weights is not None and load_backbone_weights:
            self.weights_report = load_detector(self.model, backbone, class_names, weights, weights_predictor)
        # A submodule, because it has a network of its own, whose tensors are in checkpoints.
        self.alternating = AlternatingTraining(self.model, alternating) if training_scheme == "alternating" else None
        self._joint = JointTraining(self.model)
        self.val_ap, self.test_ap = DetectionAP(class_names), DetectionAP(class_names)
        top_k = reachable(min(rpn.post_nms_test, rpn.pre_nms_test * len(self.model.backbone.strides)))
        self.val_recall, self.test_recall = ProposalRecall(class_names, top_k), ProposalRecall(class_names, top_k)

    @property
    def scheme(self) -> JointTraining:
        """Return the way in which it is trained."""
        return self.alternating or self._joint

    @classmethod
    def from_checkpoint(cls, path: str | Path, **roi: object) -> Self:
        """Return the detector of a checkpoint, on the CPU, in evaluation mode; nothing else is read.

        Args:
            path: The checkpoint.
            roi: Options of `RoIConfig` that replace those of the checkpoint.

        Raises:
            InputError: The file is missing, unreadable, not a checkpoint of this class, or of an alternating training
                that has no unified network yet.
        """
        checkpoint = read_checkpoint(path)
        check_finite(path, checkpoint["state_dict"])
        try:
            options = checkpoint["hyper_parameters"]
            given = {"roi": options["roi"] | roi} if roi else {}
            module = cls(**options | given, load_backbone_weights=False)
        except InputError as error:  # such as a part of a package that is not installed
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # options of other kinds than any of ours
            raise InputError(f"{path}: not a checkpoint of frcnn fit ({brief(error)})") from error
        module.scheme.restore(checkpoint)
        module.scheme.check_whole(path)
        check_state(path, checkpoint["state_dict"], module.state_dict())
        module.bit_depth = bit_depth_of(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module.eval()

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """Do as Lightning does, without first reading the backbone's weights, which the checkpoint replaces.

        The module is in training mode; `from_checkpoint` is for detecting.
        """
        module: Self = super().load_from_checkpoint(*args, **{"load_backbone_weights": False} | kwargs)
        return module

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return the detections of images, each (3, H, W) RGB in 0..255; see `FasterRCNN.forward`."""
        return self.scheme.detect(images)[0]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, before its weights are loaded.

        Raises:
            InputError: It was trained on other classes, or on the same ones in another order, or on images of another
                bit depth, or its network or its training scheme differs.
        """
        trainer = trainer_of(self)  # None in load_from_checkpoint
        path = (trainer and trainer.ckpt_path) or "the checkpoint"
        fit = trainer is not None and trainer.state.fn == "fit"
        self.check_origin(path, checkpoint, fit)
        check_bit_depth(path, checkpoint, getattr(getattr(trainer, "datamodule", None), "reading", None))
        self.scheme.restore(checkpoint, self if fit else None)
        check_state(path, checkpoint["state_dict"], self.state_dict())
        check_finite(path, checkpoint["state_dict"])
        if fit:
            self._other_optimizer = check_resumption(path, checkpoint, self.hparams, self._parameter_groups())
            if not self.optimizer_config.ema_decay and "current_model_state" in checkpoint:
                checkpoint["state_dict"] = checkpoint["current_model_state"]  # and not the averages

    def check_origin(self, path: object, checkpoint: Mapping[str, Any], fit: bool) -> None:
        """Check what a checkpoint was trained on and how; `fit`: the training is to go on.

        Raises:
            InputError: On other classes, or on the same ones in another order, or by another training scheme.
        """
        check_classes(path, checkpoint, self.class_names)
        scheme: SchemeName = "joint" if checkpoint.get("alternating") is None else "alternating"
        if fit and scheme != self.scheme.name:
            raise InputError(f"{path}: was trained by training_scheme {scheme}; go on with the same one")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the training scheme needs to go on."""
        self.scheme.save(checkpoint)

    # Training

    def setup(self, stage: str) -> None:
        """Say which weights the training starts from and how CPUs compute, and compile, where asked for."""
        if stage == "fit" and self.weights_report is not None:
            rank_zero_info(self.weights_report.summary())
        line = use_cpu_kernels(self.cpu_kernels)
        if trainer_of(self) is not None and self.trainer.strategy.root_device.type == "cpu":
            rank_zero_info(line)
        if stage != "predict" and self.compile_mode != "none":
            compile_networks(compilable(self), self.compile_mode, self.trainer.strategy.root_device)

    def on_train_start(self) -> None:
        """Begin or go on; let changed options of a resume take effect."""
        self.scheme.start()
        say_lr(self.optimizer_config, self.trainer)
        if self._other_optimizer is not None:
            steps, groups = self.scheme.steps(self.trainer), self._parameter_groups()
            let_options_count(self.trainer, groups, self.optimizer_config, steps, not self._other_optimizer)
            self._other_optimizer = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make the randomness of a step (sampling, dropout) a function of seed, step and rank.

        So an interrupted and resumed run repeats an undisturbed one exactly. Before, the training scheme goes on to its
        next stage where that is due.
        """
        self.scheme.advance(self)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        self.batch_seed = hash((seed, step, self.global_rank)) & 0x7FFF_FFFF_FFFF_FFFF
        torch.manual_seed(self.batch_seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the scheme's losses; each is logged as `train/loss_*`."""
        images, targets = batch
        losses = self.scheme.losses(images, targets)
        for name, value in self.scheme.logged().items():
            self.log(name, constant([value], losses["loss"])[0], batch_size=len(images))
        for name, loss in losses.items():
            shown = name in (*LOSS_NAMES, "loss")  # and not those of a cascade's stages
            self.log(f"train/{name}", loss.detach(), prog_bar=shown, batch_size=len(images))
        self.last_losses = {name: loss.detach() for name, loss in losses.items()}
        trainer = self.trainer
        loss = losses["loss"] if trainer.world_size == 1 else spoilt(losses["loss"])
        return share_of_step(loss, batch_idx, trainer.num_training_batches, trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser over the groups of `parameter_groups`, and a schedule that advances by steps.

        Both are those of the scheme's stage at work.
        """
        optimizer = build_optimizer(self._parameter_groups(), self.optimizer_config)
        scheduler = LambdaLR(optimizer, lr_factor(self.optimizer_config, self.scheme.steps(self.trainer)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Mark in profiles what the optimiser does after the closure, which is all else of a step."""
        with ExitStack() as update:

            def closure() -> Any:
                loss = optimizer_closure and optimizer_closure()
                update.enter_context(part(OPTIMIZER))
                return loss

            hook = optimizer.optimizer.register_step_post_hook(lambda *_: update.close())
            update.callback(hook.remove)
            optimizer.step(closure=closure)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        new_layers = [layer for layer in self.modules() if isinstance(layer, RegionProposalNetwork | BoxPredictor)]
        return parameter_groups(self, new_layers, replace(self.optimizer_config, lr=self.lr))

    @property
    def lr(self) -> float:
        """Return the training's learning rate, which Lightning's `LearningRateFinder` looks for here, and sets."""
        return self.optimizer_config.lr * lr_scale(self.optimizer_config, trainer_of(self))

    @lr.setter
    def lr(self, value: float) -> None:
        own = value / lr_scale(self.optimizer_config, trainer_of(self))
        self.optimizer_config = replace(self.optimizer_config, lr=own)
        self.hparams["optimizer"]["lr"] = own
        self._other_optimizer = True  # the finder alone would forget it after a step

    def check_endless(self) -> None:
        """Check that a training that only time or early stopping ends is possible.

        Raises:
            InputError: The schedule or the training scheme needs the training's length.
        """
        self.scheme.check_endless()
        lr_factor(self.optimizer_config, math.inf)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return a stop at losses that are not finite, and averaged weights where asked for."""
        if self.trainer.state.fn != "fit":
            return []
        config = self.optimizer_config
        averages = [AveragedWeights(config.ema_decay)] if config.ema_decay else []
        # In this order when a checkpoint is made.
        return [*averages, FiniteLosses(config.skip_nonfinite, self.report_folder)]

    # Evaluation: one pass yields detections and proposals

    def evaluate_only(self, class_names: Sequence[str]) -> None:
        """Let the metrics of validations and tests be of these classes alone, as if there were no others.

        Raises:
            InputError: There is no such class.
        """
        chosen = chosen_classes(class_names, self.class_names)
        for metric in (self.val_ap, self.test_ap, self.val_recall, self.test_recall):
            metric.only = chosen

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Tensor]]]:
        """Return the `detections` of the batch; update the metrics of the whole split."""
        return self._evaluate(batch, self.val_ap, self.val_recall)

    def on_validation_epoch_end(self) -> None:
        """Log `val/*` over the whole split."""
        self._log_metrics("val", self.val_ap, self.val_recall)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Tensor]]]:
        """Return the `detections` of the batch; update the metrics of the whole split."""
        return self._evaluate(batch, self.test_ap, self.test_recall)

    def on_test_epoch_end(self) -> None:
        """Log `test/*` over the whole split."""
        self._log_metrics("test", self.test_ap, self.test_recall)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """Return the detections of the batch; targets are not looked at."""
        return self.scheme.detect(batch[0])[0]

    def _evaluate(self, batch: Batch, ap: DetectionAP, recall: ProposalRecall) -> dict[str, list[dict[str, Tensor]]]:
        images, targets = batch
        detections, proposals = self.scheme.detect(images)
        ap.update(detections, targets)
        recall.update(proposals, targets)
        return {"detections": detections}

    def _log_metrics(self, stage: str, ap: DetectionAP, recall: ProposalRecall) -> None:
        # Metrics are computed from all ranks' gathered states, so every rank logs the same numbers.
        metrics = {**(ap.compute() if self.scheme.detects else {}), **recall.compute()}
        shown = {"AP50_voc07", "AP"}
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in shown, rank_zero_only=False)
        ap.reset()
        recall.reset()


def _config(cls: type[C], value: C | dict[str, Any]) -> C:
    return cls(**value) if isinstance(value, dict) else value
