"""`frcnn fit|validate|test`: LightningCLI with a run folder, exact resuming, and one-line errors."""

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities import rank_zero_info

from detector.backbones.base import BackboneConfig
from detector.backbones.timm_models import timm_model
from detector.errors import InputError
from detector.image_batch import ImageConfig
from detector.training.callbacks.checkpoints import AtomicCheckpoints, BestCheckpoint
from detector.training.callbacks.detection_curves import DetectionCurves
from detector.training.callbacks.hyperparameters import Hyperparameters
from detector.training.callbacks.network_summary import NetworkSummary
from detector.training.callbacks.oracles import Oracles
from detector.training.callbacks.progress import LossProgressBar
from detector.training.callbacks.run_files import RunFiles
from detector.training.callbacks.validation_losses import ValidationLosses
from detector.training.checkpoint_content import read_checkpoint
from detector.training.compilation import check_compiler, check_deterministic
from detector.training.loggers import RunTensorBoard
from detector.training.resuming import changed_options, changes_text, check_training_state
from experiments.arguments import add_options, values_of
from experiments.output import counted, duration
from experiments.results.files import write_devkit_results
from experiments.run.callbacks import checkpoint_callbacks, training_callbacks, without_replaced
from experiments.run.checks import check_devkit_names, check_monitors, check_room, check_writable, is_endless
from experiments.run.failures import told_in_one_line
from experiments.run.folder import (
    ENVIRONMENT_VARIABLE,
    LAST,
    choose_run_folder,
    folder_of_evaluation,
    gone_if_refused,
    repeated_run,
    run_folder_of,
)
from experiments.run.grid_progress import axes_of_environment
from experiments.run.host_memory import keep_freed_memory
from experiments.run.options import TestOptions, ValidateOptions
from experiments.run.parser_errors import cause_of
from experiments.run.precision import check_precision, resolve_precision, say_range
from experiments.run.ranks import of_first_process
from experiments.run.resuming import (
    check_changes,
    experiment_of,
    folder_to_go_on_in,
    lacks_numbers,
    last_checkpoint,
    nothing_left,
    other_evaluation,
    other_options,
    repeat_text,
)
from experiments.run.summary import print_evaluation, print_training, program, shown_path
from experiments.run.training_options import OptionsOfRuns


class ConfigFile(SaveConfigCallback):
    """Write the resolved configuration into the run folder: `config.yaml`, and beside it one file per resumption."""

    def __init__(self, *args: Any, run_folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_folder = run_folder  # loggers have folders of their own, or none

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write once, at the start of a training."""
        if trainer.is_global_zero and stage == "fit" and not self.already_saved:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            names = ["config.yaml", *(f"config_resumed_{n}.yaml" for n in range(1, 10_000))]
            name = next(name for name in names if not (self.run_folder / name).exists())
            self.parser.save(self.config, self.run_folder / name, skip_none=False, multifile=False)
            self.already_saved = True


class DetectorCLI(OptionsOfRuns):
    """The command line of a training, a validation or a test: of the command that comes first in `arguments`."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        super().__init__(arguments, {}, save_config_callback=ConfigFile)

    run_folder: Path
    goes_on_from: Path | None

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != self._arguments[0]:  # only its name and description are shown; its options take time to find
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            add_options(parser, TestOptions if subcommand == "test" else ValidateOptions)
        return parser

    def instantiate_classes(self) -> None:
        """Tell the data where the run keeps the lists of splits that are made."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # what a constructor of a callback or logger says, among many lines of the parser
            cause = cause_of(str(error))
            if isinstance(error, InputError) or cause == str(error):
                raise
            raise InputError(cause) from error
        if self.classes is not None:
            self.model.evaluate_only(self.classes)
        if not self.config[self.subcommand].trainer.fast_dev_run:
            of = self.run_folder if self.goes_on_from is None else self.goes_on_from  # lists that a run has stay as is
            self.datamodule.splits_folder = (of if (of / "splits").is_dir() else self.run_folder) / "splits"
            self.datamodule.report_folder = self.model.report_folder = self.run_folder

    def before_fit(self) -> None:
        """Read the data before Lightning makes the run's folder, so that bad data leaves none behind.

        The same for what the device cannot do, a schedule without a length, and changed options.
        """
        if (checkpoint := self.config.fit.ckpt_path) and not self.resume_changed:
            self.model.check_origin(checkpoint, self.done_before, fit=True)
            of_model = changed_options(self.done_before["hyper_parameters"] or {}, self.model.hparams, "model.")
            check_changes(checkpoint, self.changes | of_model)
        if is_endless(self.trainer):
            self.model.check_endless()
        check_monitors(self.trainer.callbacks, self.model, bool(self.trainer.limit_val_batches))  # type: ignore[attr-defined]
        self._read_data("fit")
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run and self.trainer.checkpoint_callbacks:  # type: ignore[attr-defined]
            check_room(self.run_folder, self.model)
        if isinstance(self.datamodule.augmentation, list) and not getattr(self.datamodule, "download", False):
            self.datamodule.train_dataset.try_augmentation()
        lists = self.datamodule.splits_folder
        if lists is not None and lists.parent != self.run_folder and self.trainer.is_global_zero:
            shutil.copytree(lists, self.run_folder / "splits", dirs_exist_ok=True)
        self._began = time.monotonic()

    def after_fit(self) -> None:
        """Print the main metrics, where everything is, and what to do next."""
        path = self.run_folder / "metrics.json"
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run or not path.is_file():  # type: ignore[attr-defined]
            return
        metrics = json.loads(path.read_text())
        first = self.done_before["global_step"] if self.config.fit.ckpt_path else 0
        lines = [
            ("trained", f"{counted(metrics['epoch'], 'epoch')}, {counted(metrics['step'], 'step')}"),
            ("wall time", duration(time.monotonic() - self._began) + (f", from step {first} on" if first else "")),
            ("run", shown_path(self.run_folder)),
        ]
        last = self.run_folder / "checkpoints" / "last.ckpt"
        for best in self.trainer.checkpoint_callbacks:
            if isinstance(best, BestCheckpoint) and best.best_model_path:
                score = "" if best.best_model_score is None else f" ({best.monitor} {best.best_model_score:.3f})"
                lines.append(("best checkpoint", shown_path(best.best_model_path) + score))
        commands = [[*program(), "tensorboard", shown_path(self.run_folder.parent)]]
        if last.is_file():
            lines.append(("last checkpoint", shown_path(last)))
            again = "test" if self.datamodule.splits.names["test"] else "validate"
            checkpoint = ["--ckpt_path", shown_path(last)]
            image = shown_path(self.datamodule.val_dataset.image_path(0))
            where = ["--images", image, "--output", shown_path(self.run_folder / "predictions")]
            commands = [[*program(), again, *checkpoint], [*program(), "predict", *checkpoint, *where], *commands]
        print_training(metrics, lines, commands)

    def before_validate(self) -> None:
        """Read the data, so that bad data is told before anything is computed."""
        self._read_data("validate")

    def after_validate(self) -> None:
        """Print the metrics, and what the oracles say, if asked to."""
        self._print_metrics("val")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Oracles) and self.trainer.is_global_zero:
                print(callback.table())

    def before_test(self) -> None:
        """Read the data, so that bad data is told before anything is computed."""
        if self.config[self.subcommand].save_devkit_results is not None:
            check_devkit_names(self.datamodule.class_names)
        self._read_data("test")

    def _read_data(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        if self.model.compile_mode != "none":
            check_compiler(device)
        if stage == "fit":
            check_deterministic(self.model.model.roi_heads.config.pooling, device)
        if not getattr(self.datamodule, "download", False):
            self.datamodule.setup(stage)

    def after_test(self) -> None:
        """Print the metrics, and write the devkit's files, if asked to."""
        self._print_metrics("test")
        folder = self.config[self.subcommand].save_devkit_results
        if folder is not None and self.trainer.is_global_zero:
            write_devkit_results(self.run_files.predictions or [], self.datamodule.class_names, folder)

    def _print_metrics(self, stage: str) -> None:
        config = self.config[self.subcommand]
        if config.verbose and self.trainer.is_global_zero:
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            print_evaluation(metrics, stage, None if config.trainer.fast_dev_run else shown_path(self.run_folder))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Leave out Lightning's own table."""
        return super()._prepare_subcommand_kwargs(subcommand) | ({} if subcommand == "fit" else {"verbose": False})

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyperparameters win over the command line in silence."""

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, and do not ask for backbone weights that a checkpoint replaces."""
        config = self.config[self.subcommand]
        checkpoint = config.get("ckpt_path")
        self.goes_on_in: Path | None = None
        if checkpoint == LAST:
            self.goes_on_in, checkpoint = last_checkpoint(config, self.subcommand == "fit")
            config.ckpt_path = checkpoint
        if checkpoint is not None:
            content = read_checkpoint(checkpoint)  # to refuse an unusable one at once
            if self.subcommand == "fit":
                check_training_state(checkpoint, content)
            kept = ("global_step", "loops", "hyper_parameters", "alternating", "losses")
            self.done_before = {key: content.get(key) for key in kept}
            config.model.load_backbone_weights = False
        if self.subcommand == "fit":
            self.resume_changed, config.resume_changed = config.resume_changed, None  # of this time alone
        trainer = config.trainer
        check_precision(trainer.precision)
        trainer.precision = resolve_precision(trainer.precision, trainer.accelerator, trainer.devices)
        _normalise_as_timm(config.model)
        say_range(trainer.precision, trainer.accelerator, ImageConfig(**config.model.image.as_dict()))
        if config.get("oracle") and trainer.fast_dev_run:
            raise InputError("--oracle: a whole validation is needed, not --trainer.fast_dev_run")
        devkit_folder = config.get("save_devkit_results")
        if devkit_folder is not None and (Path(devkit_folder).is_file() or config.trainer.fast_dev_run):
            raise InputError(
                f"--save_devkit_results {devkit_folder}: must be a folder, and a whole test is needed, not fast_dev_run"
            )
        if devkit_folder is not None:
            check_writable(Path(devkit_folder), "--save_devkit_results")
        self._choose_run_folder(config, checkpoint)
        self.classes: list[str] | None = config.get("classes")
        if self.subcommand != "fit":
            self._choose_results_folder(config, checkpoint)
        if not config.trainer.fast_dev_run:
            check_writable(self.run_folder, "--results_dir" if config.get("results_dir") else "--runs_dir")
            os.environ[ENVIRONMENT_VARIABLE] = str(self.run_folder)

    def _choose_run_folder(self, config: Namespace, checkpoint: str | None) -> None:
        results = config.get("results_dir")
        old = run_folder_of(checkpoint) if checkpoint is not None else None
        repeated = repeated_run(config.get("config") or [], config.run_name) if self.subcommand == "fit" else None
        numbered = repeated is not None and not values_of(self._arguments, "--run_name")

        def choose() -> str:
            found = Path(results) if results is not None else self.goes_on_in if checkpoint is None else None
            try:
                if found is None and checkpoint is not None:
                    found = folder_to_go_on_in(checkpoint, config, numbered) if self.subcommand == "fit" else old
                where = (config.runs_dir or "runs", experiment_of(config), config.run_name, int(config.seed_everything))
                return str(found or choose_run_folder(*where, numbered))
            except OSError as error:  # a name too long, a folder that may not be looked into
                raise InputError(f"{error.filename}: no run can be written there ({error.strerror})") from error

        told = ENVIRONMENT_VARIABLE in os.environ
        self.run_folder = Path(choose() if told else of_first_process(choose, config.trainer.num_nodes))
        if repeated is not None and repeated.absolute() != self.run_folder.absolute():
            rank_zero_info(f"{self.run_folder}: {repeat_text(repeated, config)}")
        self.goes_on_from = old if self.subcommand == "fit" and old != self.run_folder else None
        self.changes = other_options(old, config) if old is not None and self.subcommand == "fit" else {}
        if self.changes:
            rank_zero_info(f"{old}: goes on with other options: {changes_text(self.changes)}")

    def _choose_results_folder(self, config: Namespace, checkpoint: str | None) -> None:
        """Choose where an evaluation is written: the run's own folder for its own options and all classes."""
        own, names = self.run_folder, ("--runs_dir", "--experiment", "--run_name")
        if checkpoint and self.goes_on_in is None and (config.results_dir or own == run_folder_of(checkpoint)):
            for option in (name for name in names if values_of(self._arguments, name)):
                raise InputError(f"{option}: an evaluation goes into its run's folder, or --results_dir FOLDER")
        if config.results_dir is None:
            others = other_evaluation(own, config) if self.subcommand == "validate" else {}  # tests are counted
            self.run_folder = folder_of_evaluation(own, others, self.classes or [])
            self.goes_on_from = own if own != self.run_folder else None

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave a training alone that has come to its end; one that was killed just before is validated."""
        trainer, checkpoint = self.trainer, self.config[subcommand].get("ckpt_path")
        resumed = checkpoint and subcommand == "fit"
        ended = resumed and nothing_left(self.done_before, trainer.max_epochs, trainer.max_steps)
        if not ended:
            try:
                with gone_if_refused(self.run_folder), told_in_one_line(trainer):
                    super()._run_subcommand(subcommand)
            except (ValueError, MisconfigurationException) as error:  # options that Lightning looks at only now
                if isinstance(error, ValueError) and "`val_check_interval`" not in str(error):
                    raise
                raise InputError(f"--trainer: {error}") from error
            return
        self.model.check_origin(checkpoint, self.done_before, fit=True)
        message = f"{checkpoint}: this training is complete: {ended}; to train on, give more"
        if self.goes_on_from is not None:
            raise InputError(message)
        if trainer.limit_val_batches and lacks_numbers(self.run_folder, self.done_before["global_step"]):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunFiles):
                    callback.losses = self.done_before["losses"] or {}
            trainer.validate(self.model, self.datamodule, checkpoint, verbose=False)
        elif trainer.is_global_zero:
            print(f"{message}. Nothing was changed", file=sys.stderr)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the logger and the callbacks of the run folder."""
        config = self.config[self.subcommand].trainer
        if isinstance(config.accumulate_grad_batches, int) and config.accumulate_grad_batches < 1:
            raise InputError(f"--trainer.accumulate_grad_batches {config.accumulate_grad_batches}: must be at least 1")
        self.trainer_defaults["callbacks"] = self._callbacks(config)
        self.save_config_kwargs["run_folder"] = self.run_folder
        if config.logger in (None, True):
            kwargs["logger"] = RunTensorBoard(
                str(self.run_folder.parent.parent),
                name=self.run_folder.parent.name,
                version=self.run_folder.name,
                default_hp_metric=False,
            )
        kwargs["enable_model_summary"] = False  # Lightning's own, beside `NetworkSummary`
        kwargs["plugins"] = _with_atomic_checkpoints(self._get(self.config_init, "trainer", default={}).get("plugins"))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:  # an unknown accelerator, devices that are not there
            raise InputError(f"--trainer: {error}") from error
        for logger in trainer.loggers:
            if type(logger) is TensorBoardLogger:  # one's own shows the same cards
                logger.__class__ = RunTensorBoard
        keep_freed_memory(trainer.strategy.root_device)
        return trainer

    def _callbacks(self, config: Namespace) -> list[pl.Callback]:
        callbacks: list[pl.Callback] = [] if config.enable_progress_bar is False else [LossProgressBar()]
        if config.fast_dev_run:
            return callbacks
        self.run_files = RunFiles(self.run_folder)
        if self.subcommand == "fit":
            every, loggers = config.log_every_n_steps or 20, config.logger not in (False, [])
            usual = training_callbacks(self.run_folder, every, loggers)
            callbacks += [] if config.enable_model_summary is False else [NetworkSummary()]
            if config.enable_checkpointing is not False:
                callbacks += checkpoint_callbacks(self.run_folder / "checkpoints", self.config.fit.save_every_minutes)
        else:
            usual = [Hyperparameters(axes_of_environment()), DetectionCurves()]
            usual += [ValidationLosses()] if self.subcommand == "validate" and self.classes is None else []
            if asked := self.config[self.subcommand].get("oracle"):
                usual.append(Oracles(self.run_folder, asked))
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        return [*callbacks, self.run_files, *without_replaced(usual, given if isinstance(given, list) else [given])]


def run_lightning(arguments: list[str]) -> None:
    """Run `fit`, `validate` or `test`, the first of the arguments, with the rest of a command line."""
    # Of a checkpoint's callbacks an evaluation needs none, and a training only what `BestCheckpoint` takes over.
    if arguments[0] != "fit":
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
    DetectorCLI(arguments)


def _normalise_as_timm(model: Namespace) -> None:
    """Give images the mean and deviation that a network of timm was trained with, unless others are given; say so.

    Raises:
        InputError: The options of the backbone are wrong.
    """
    backbone, image, usual = BackboneConfig(**model.backbone.as_dict()), model.image, ImageConfig()
    if backbone.name != "timm":
        return
    known = timm_model(backbone.model, backbone.levels)
    given, wanted = ([list(each.mean), list(each.std)] for each in (image, known))
    if given != wanted:
        texts = [f"image.mean {mean}, image.std {std}" for mean, std in (given, wanted)]
        if given == [usual.mean, usual.std]:
            image.mean, image.std = wanted
            rank_zero_info(f"{texts[1]}: set as {backbone.model} was trained")
        else:
            rank_zero_info(f"warning: {texts[0]}: {backbone.model} was trained with {texts[1]}")


def _with_atomic_checkpoints(plugins: Any) -> list[Any]:
    given = list(plugins) if isinstance(plugins, list | tuple) else [] if plugins is None else [plugins]
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AtomicCheckpoints()]
