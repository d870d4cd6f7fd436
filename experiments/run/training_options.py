"""The options of a training: what `frcnn fit` has, and a parser of it that builds nothing, for other commands."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from datamodules.own_format import LabelledImage, OwnFormat
from detector.parts import say_strangers
from detector.training.lightning_module import FasterRCNNModule
from experiments.arguments import add_options
from experiments.dataset.formats import FORMATS, data_module_of
from experiments.run.folder import is_of_run
from experiments.run.option_table import Rows, config_files, find_data_format, rows_of, write_table
from experiments.run.options import RunOptions
from experiments.run.precision import Trainer


class AnyFormat(OwnFormat):
    """A format without images or options, for the options that all formats of one's own have."""

    def splits(self) -> Sequence[str]:
        """Return no names."""
        return []

    def images(self, split: str) -> Iterable[LabelledImage]:
        """Return no images."""
        return []


class OptionsOfRuns(LightningCLI):
    """The options of Lightning, the model and the data, and what `frcnn fit`, `validate` and `test` add."""

    def __init__(self, arguments: list[str], parser_kwargs: dict[str, Any], **named: Any) -> None:
        for file, content in config_files(arguments):
            if is_of_run(file):
                say_strangers(file, content)
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

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that takes whole names only."""
        return super().init_parser(allow_abbrev=False, **kwargs)

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


def option_table() -> dict[str, Rows]:
    """Return what `option_table.json` is to say, from the parsers themselves."""
    formats = {
        name: rows_of(OptionsCLI([f"--data_format={name}", "--data.root=here"], prog="frcnn").parser)
        for name in FORMATS
    }
    own = OptionsCLI(["--data_format=experiments.run.training_options.AnyFormat", "--data.root=here"], prog="frcnn")
    formats["own"] = rows_of(own.parser)
    methods: dict[str, Rows] = {}
    for name, skipped in OptionsOfRuns.subcommands().items():
        parser = LightningArgumentParser()
        parser.add_method_arguments(pl.Trainer, name, skip=set(skipped))
        methods[name] = rows_of(parser)
    of_data = {
        name: {key: row for key, row in rows.items() if key.startswith("data.")} for name, rows in formats.items()
    }
    common = {key: row for key, row in formats["voc"].items() if key not in of_data["voc"] | methods["fit"]}
    return {"all": common, **of_data, **methods}


if __name__ == "__main__":
    write_table(option_table())
