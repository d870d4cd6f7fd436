"""Parses what `frcnn fit` parses, and builds nothing: for commands that need the options of a training alone."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser

from detector.training.lightning_module import FasterRCNNModule
from experiments.data_format import DATA_FORMATS, find_data_format
from experiments.lightning_cli import TRAINER_DEFAULTS, DetectorCLI
from experiments.precision import Trainer


class OptionsCLI(DetectorCLI):
    """The options of `frcnn fit`, as `config`, from config files and arguments. Subclasses add their own.

    Args:
        arguments: Of the command line.
        parser_kwargs: Of jsonargparse's parser, such as `prog`.
    """

    def __init__(self, arguments: list[str], **parser_kwargs: Any) -> None:
        super().__init__(
            FasterRCNNModule,
            DATA_FORMATS[find_data_format(arguments)],
            save_config_callback=None,
            trainer_class=Trainer,
            seed_everything_default=0,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, **parser_kwargs},
            args=arguments,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What `frcnn fit` has."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(pl.Trainer, "fit", skip=set(self.subcommands()["fit"]))

    def before_instantiate_classes(self) -> None:
        """Do nothing: there is no run."""

    def instantiate_classes(self) -> None:
        """Do nothing: only the configuration is wanted."""

    def _set_seed(self) -> None:
        """Do nothing: what is random here has its own generator."""
