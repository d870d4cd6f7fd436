"""The `frcnn` command: one row for each command, and what happens around it."""

import errno
import os
import select
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Final, Literal

from detector.errors import InputError, TrainingError, one_line, shortened
from detector.kernels.threads import wait_politely
from detector.training.progress_line import RANKS
from experiments.arguments import as_spelt_now, build, find_modules_here, new_parser, one_line_of_the_parser
from experiments.dataset.data_format import kind_of_format
from experiments.run.option_table import (
    check_arguments,
    config_of_checkpoint,
    find_data_format,
    training_parser,
    with_whole_format,
)
from experiments.run.quiet import keep_quiet
from experiments.run.startup import quick_imports, run_process
from experiments.run.training_help import part_of_help, training_help

TOO: Final = "options of a training too"


@dataclass(frozen=True)
class Command:
    """A command of `frcnn`; what is slow to import stands here as text.

    Args:
        name: One word, or two for a kind of another command.
        help: One line.
        options: "module:class" in this package: a dataclass whose docstring is the text of `--help`.
        function: "module:function" in this package. It is given the options, and may return an exit status. Without one
            there are kinds.
        takes: Also all options of a training: these, parsed, are the second argument of the function. Or "arguments":
            it parses them itself, name included.
        check: "module:function" in this package, of a module that imports nothing slow: is given the options first.
    """

    name: str
    help: str
    options: str = ""
    function: str = ""
    takes: Literal["options", "options of a training too", "arguments"] = "options"
    check: str = ""

    @property
    def prog(self) -> str:
        """Return how it is called."""
        return f"frcnn {self.name}"

    def run(self, arguments: list[str]) -> int:
        """Parse the arguments, and return the exit status of the function."""
        if not self.function:
            if not arguments:
                raise InputError(f"{self.prog}: KIND is missing; there are {_listed(self.name)}")
            print(help_text(self.name), end="")
            return 0
        options, arguments = _load(self.options), with_whole_format(arguments)
        if self.takes == "options":
            parser = new_parser(self.prog, options)
        else:
            part = part_of_help(arguments)
            arguments = [*config_of_checkpoint(arguments), *arguments] if self.takes == "arguments" else arguments
            parser = training_parser(self.name, options, kind_of_format(find_data_format(arguments)))
            if part is not None:
                print(training_help(parser, options, part), end="")
                return 0
        with one_line_of_the_parser(parser, arguments):
            if self.takes == "options":
                given: list[Any] = [build(options, parser.parse_args(arguments))]
            else:
                check_arguments(parser, arguments)
                given = [[self.name, *arguments]]
            if self.check:
                _load(self.check)(*given)
            with quick_imports():
                function = _load(self.function)
                if self.takes == TOO:
                    from experiments.run.training_options import OptionsCLI

                    config = OptionsCLI(arguments, options, prog=self.prog).config
                    given = [build(options, config), config]
            return function(*given) or 0


COMMANDS: Final = (
    Command(
        "fit",
        "train:     frcnn fit --config experiments/mini_voc.yaml",
        "run.options:RunOptions",
        "run.lightning_cli:run_lightning",
        "arguments",
    ),
    Command(
        "validate",
        "evaluate a checkpoint on the validation splits",
        "run.options:ValidateOptions",
        "run.lightning_cli:run_lightning",
        "arguments",
    ),
    Command(
        "test",
        "evaluate a checkpoint on the test splits",
        "run.options:TestOptions",
        "run.lightning_cli:run_lightning",
        "arguments",
    ),
    Command(
        "predict",
        "detect objects in image files, and draw them",
        "run.options:PredictOptions",
        "run.predict:predict",
        check="run.options:check_prediction",
    ),
    Command(
        "export",
        "write a detector as a file for ONNX Runtime, OpenVINO or PyTorch, with a reader and a model card",
        "export.options:ExportOptions",
        "export.command:export",
        check="export.options:check_export",
    ),
    Command(
        "replay",
        "run a step again whose loss or gradient was not finite: frcnn replay RUN/nonfinite_step7.pt",
        "run.options:ReplayOptions",
        "run.replay:replay",
        check="run.options:check_dump",
    ),
    Command(
        "evaluate",
        "score any detector's result files against the annotations of splits",
        "results.options:EvaluateOptions",
        "results.evaluate:evaluate",
    ),
    Command(
        "ablate",
        "train a grid of options and seeds:     frcnn ablate experiments/ablations/anchors_mini_voc.yaml",
        "ablation.options:AblateOptions",
        "ablation.ablate:ablate",
        check="ablation.grid:check_cells",
    ),
    Command(
        "anchors",
        "audit anchors against the training annotations, and suggest better ones; needs no images",
        "anchors.options:AuditOptions",
        "anchors.command:print_audit",
        TOO,
    ),
    Command(
        "show-data",
        "draw augmented training images with their boxes into a contact sheet",
        "dataset.options:ShowDataOptions",
        "dataset.show_data:show_data",
        TOO,
    ),
    Command(
        "report",
        "a grid or a folder of runs as one table, finished or not: frcnn report runs/anchors_mini_voc",
        "report.options:ReportOptions",
        "report.command:report",
    ),
    Command(
        "compare",
        "two runs: options, metrics with intervals, classes, and the images on which they differ most",
        "results.options:CompareOptions",
        "results.compare:compare",
    ),
    Command(
        "tensorboard",
        "show runs in TensorBoard: losses, AP, pictures, anchors, HPARAMS",
        "board.options:TensorBoardOptions",
        "board.command:tensorboard",
    ),
    Command(
        "serve",
        "a page on which to drop an image and look inside a trained detector: frcnn serve runs/shapes/seed0",
        "board.options:ServeOptions",
        "board.serving:serve",
    ),
    Command("benchmark", "time this code beside a peer"),
    Command(
        "benchmark train",
        "a training step, beside torchvision's detector",
        "benchmark.options:TrainOptions",
        "benchmark.command:benchmark",
    ),
    Command(
        "benchmark infer",
        "detection, beside torchvision's detector",
        "benchmark.options:InferOptions",
        "benchmark.command:benchmark",
    ),
    Command(
        "benchmark data",
        "the training loader, beside VOCDetection with transforms.v2",
        "benchmark.options:LoaderOptions",
        "benchmark.command:benchmark",
    ),
    Command(
        "benchmark evaluate",
        "metrics, beside torchmetrics",
        "benchmark.options:MetricsOptions",
        "benchmark.command:benchmark",
    ),
    Command(
        "doctor",
        "what is wrong with a dataset: frcnn doctor DATASET_DIR",
        "dataset.options:CheckDatasetOptions",
        "dataset.doctor:doctor",
    ),
    Command(
        "init",
        "look at a dataset, and write a config for it: frcnn init DATASET_DIR",
        "dataset.options:InitOptions",
        "dataset.init:init",
    ),
    Command(
        "mini-voc",
        "write a small synthetic dataset in VOC format",
        "dataset.options:MiniVocOptions",
        "dataset.mini_voc:mini_voc",
    ),
)


def help_text(above: str = "") -> str:
    """Return the list of all commands, or of the kinds of one."""
    rows = {row.name.removeprefix(above).strip(): row for row in COMMANDS if _is_below(row, above)}
    width = max(map(len, rows))
    usage = f"frcnn {above} KIND" if above else "frcnn COMMAND"
    about = f"{_find([above]).help}." if above else "Faster R-CNN on PASCAL VOC in PyTorch Lightning."
    lines = [f"usage: {usage} [OPTIONS]      ({usage} --help shows all options)", "", about[0].upper() + about[1:], ""]
    return "\n".join([*lines, *(f"  {name:{width}}  {row.help}" for name, row in rows.items()), ""])


def _is_below(row: Command, above: str) -> bool:
    return row.name.startswith(f"{above} ") if above else " " not in row.name


def _find(words: list[str]) -> Command:
    """Return the command that the first words name, or the first two.

    Raises:
        InputError: There is none.
    """
    rows = {row.name: row for row in COMMANDS}
    found = rows.get(" ".join(words[:2])) or rows.get(words[0])
    if found is None:
        meant = get_close_matches(words[0], rows, n=1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        raise InputError(f"{words[0]!r} is not a command of frcnn; there are {_listed('')}{hint}")
    if not found.function and len(words) > 1 and words[1] not in ("-h", "--help"):
        raise InputError(f"{found.prog}: {words[1]!r} is not a KIND of it; there are {_listed(found.name)}")
    return found


def _listed(above: str) -> str:
    return ", ".join(row.name.removeprefix(above).strip() for row in COMMANDS if _is_below(row, above))


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return the exit status.

    Returns:
        0 on success, 2 after one line on stderr about bad usage or input, 1 where a run failed or inputs were left out;
        after a signal 128 and its number: 130 after Ctrl-C, 141 where what reads the output has ended, as `head` does.
    """
    if arguments is None:
        return run_process(lambda: main(sys.argv[1:]))
    find_modules_here()
    wait_politely()
    keep_quiet()
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except InputError as error:
        return _complain(one_line(error), error.details)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _complain(f"{shortened(str(error.filename))}: no file or folder can have a name that long")
    except TrainingError as error:
        _complain(one_line(error))
        return 1
    except KeyboardInterrupt:
        print("frcnn: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as end:
        if type(end).__name__ == "SIGTERMException":  # Lightning's, without a code, which would be taken for success
            sys.exit(128 + signal.SIGTERM)
        raise


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    row = _find(arguments)
    return row.run(as_spelt_now(arguments[len(row.name.split()) :]))


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(f"experiments.{module}"), name)


def _reader_has_gone() -> bool:
    """Return whether nobody reads the output any more, whose rest is then dropped."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _complain(message: str, details: Iterable[str] = ()) -> int:
    if all(os.environ.get(rank, "0") == "0" for rank in RANKS):
        print(f"frcnn: {message}", *details, sep="\n  ", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
