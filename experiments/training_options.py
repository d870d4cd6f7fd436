"""The options of a training: what `frcnn fit` has, and a parser of it that builds nothing, for other commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from detector.errors import InputError, listed
from detector.training.lightning_module import FasterRCNNModule
from experiments.arguments import add_options, values_of
from experiments.dataset.formats import FORMATS, data_module_of
from experiments.run.options import RunOptions
from experiments.run.precision import Trainer


def find_data_format(arguments: Sequence[str]) -> str:
    """Return the format that is asked for by `--data_format`, or else by `data_format:` in the last of config files.

    Raises:
        InputError: There is no such format.
    """
    in_files = [_in_file(name) for name in values_of(arguments, "--config", "-c")]
    asked = [name for name in ("voc", *in_files, *values_of(arguments, "--data_format")) if name is not None]
    if asked[-1] not in FORMATS:
        raise InputError(f"--data_format {asked[-1]}: there are {listed(list(FORMATS))}")
    return asked[-1]


def _in_file(name: str) -> str | None:
    """Return the format that a file asks for; one that cannot be read is the parser's to complain about."""
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    value = content.get("data_format") if isinstance(content, dict) else None
    return None if value is None else str(value)


class OptionsOfRuns(LightningCLI):
    """The options of Lightning, the model and the data, and what `frcnn fit`, `validate` and `test` add."""

    def __init__(self, arguments: list[str], parser_kwargs: dict[str, Any], **named: Any) -> None:
        super().__init__(
            FasterRCNNModule,
            data_module_of(find_data_format(arguments)),
            trainer_class=Trainer,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False, "log_every_n_steps": 20},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, **parser_kwargs},
            args=arguments,
            **named,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's, all but predict, which works on images rather than on a dataset."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where the run is written, and give class names from the data to the model."""
        add_options(parser, RunOptions)
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")


class OptionsCLI(OptionsOfRuns):
    """The options of `frcnn fit`, as `config`, from config files and arguments, and more of them from a dataclass."""

    def __init__(self, arguments: list[str], options: type[Any] | None = None, **parser_kwargs: Any) -> None:
        self._more = options
        super().__init__(arguments, parser_kwargs, save_config_callback=None, run=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what `frcnn fit` has, and more where asked to."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(pl.Trainer, "fit", skip=set(self.subcommands()["fit"]))
        if self._more is not None:
            add_options(parser, self._more)

    def before_instantiate_classes(self) -> None:
        """Do nothing: there is no run."""

    def instantiate_classes(self) -> None:
        """Do nothing: only the configuration is wanted."""

    def _set_seed(self) -> None:
        """Do nothing: what is random here has its own generator."""
