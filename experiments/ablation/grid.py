"""A grid file: which options vary, over which values and seeds; read and checked, without looking at the experiment."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from detector.errors import InputError, brief, flat_options
from detector.files import load_yaml
from experiments.ablation.options import AblateOptions
from experiments.arguments import one_line_of_the_parser
from experiments.dataset.data_format import kind_of_format
from experiments.output import option_text
from experiments.run.option_table import find_data_format, parse_known, training_parser, with_whole_format
from experiments.run.options import RunOptions

KEYS = ("base", "evaluate", "axes", "seeds", "exclude", "baseline", "overrides", "paper")
LONGEST_LABEL = 60

Options = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """An option, or several together, that varies over a grid.

    Attributes:
        name: In the names of cells, in tables and in TensorBoard.
        values: By label, what each value sets: option -> value.
        given: By label, the value as the file has it, if it is that of one option.
    """

    name: str
    values: Mapping[str, Options]
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> set[str]:
        """Return all options that some value of the axis sets."""
        return {option for options in self.values.values() for option in options}


@dataclass(frozen=True)
class Cell:
    """One training: a value of each axis, and a seed.

    Attributes:
        axes: Axis name -> label of the value.
        seed: Of everything random.
        options: All options that are set over the base config, the grid's `overrides` included.
    """

    axes: Mapping[str, str]
    seed: int
    options: Options

    @property
    def setting(self) -> str:
        """Return the name without the seed, such as `scales=4-8-16,ratios=1`: what several seeds share."""
        return setting_name(self.axes)

    @property
    def name(self) -> str:
        """Return a name such as `scales=4-8-16,ratios=1,seed=0`."""
        return ",".join([*filter(None, [self.setting]), f"seed={self.seed}"])


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        path: The file; its name without suffix is the grid's.
        base: The experiment that all cells start from; None in an evaluation that takes its checkpoint's.
        evaluate: Evaluate this checkpoint with every cell's options, instead of training; may hold `{seed}`.
        axes: What varies, the last one fastest.
        seeds: Each cell is trained with each.
        exclude: Combinations (axis -> label; of some axes or all) that are left out.
        baseline: Setting that the others are compared to, such as `scales=8-16-32,ratios=1`; None: none.
        overrides: Options of all cells, where no value of an axis sets another.
        paper: Setting -> published number, as a fraction.
    """

    path: Path
    base: Path | None
    evaluate: str | None
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    exclude: tuple[Mapping[str, str], ...] = ()
    baseline: str | None = None
    overrides: Options = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the file's name without suffix."""
        return self.path.stem

    def settings(self) -> Iterator[dict[str, str]]:
        """Give every combination of labels that is not excluded, the last axis fastest."""
        names = [axis.name for axis in self.axes]
        for labels in itertools.product(*(axis.values for axis in self.axes)):
            setting = dict(zip(names, labels, strict=True))
            if not any(excluded.items() <= setting.items() for excluded in self.exclude):
                yield setting

    def cells(self) -> list[Cell]:
        """Return all cells, a first seed of everything before the second, so that an unfinished grid says the most."""
        return [
            Cell(
                setting,
                seed,
                self.overrides | {k: v for axis in self.axes for k, v in axis.values[setting[axis.name]].items()},
            )
            for seed in self.seeds
            for setting in self.settings()
        ]


def check_cells(options: AblateOptions) -> None:
    """Refuse a base config, or options of axes, that `frcnn fit` would refuse; each value once, in the first cell.

    Raises:
        InputError: Names the file, or the cell.
    """
    grid = read_grid(options.grid)
    if grid.base is None:
        return
    base = [f"--config={grid.base}"]
    parser, seen = training_parser("fit", RunOptions, kind_of_format(find_data_format(base))), set[str]()
    with one_line_of_the_parser(parser, base):
        parse_known(parser, base)
    for cell in grid.cells():
        words = [f"--{option}={option_text(value)}" for option, value in cell.options.items()]
        if not seen.issuperset(words):
            try:
                with one_line_of_the_parser(parser, base):
                    parse_known(parser, with_whole_format([*base, *words]))
            except InputError as error:
                raise InputError(f"{grid.path}: cell {cell.name}: {error}") from None
            seen |= {*words}


def setting_name(axes: Mapping[str, str]) -> str:
    """Return the name of a setting, such as `scales=4-8-16,ratios=1`."""
    return ",".join(f"{name}={label}" for name, label in axes.items())


def read_grid(path: str | Path) -> Grid:
    """Read and check a grid file.

    Raises:
        InputError: What is wrong, with the file and the key or value.
    """
    path = Path(path)
    try:
        return _grid(path, _load(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def label_of(value: Any) -> str:
    """Return a value as part of a file name: [4, 8, 16] -> 4-8-16, [[1, 2], [4]] -> 1-2_4, true -> true.

    Of a class path that is the class: my_package.Wing -> Wing, and with an argument Wing-omega5.
    """
    if isinstance(value, dict) and "class_path" in value:
        arguments = (value.get("init_args") or {}).items()
        return "-".join([label_of(value["class_path"]), *(f"{key}{label_of(one)}" for key, one in arguments)])
    if isinstance(value, str) and re.fullmatch(r"[a-z_]\w*(\.\w+)*\.[A-Z]\w*", value):
        return value.rpartition(".")[2]
    if isinstance(value, list):
        return ("_" if any(isinstance(item, list) for item in value) else "-").join(label_of(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}); give a grid file, see experiments/ablations") from None
    except UnicodeDecodeError as error:
        raise InputError(f"is no YAML: {brief(error)}") from None
    content = _mapping(load_yaml(text), "the file", "keys such as base, axes and seeds")
    for key in content:
        if key not in KEYS:
            meant = get_close_matches(str(key), KEYS, n=1)
            hint = f"; did you mean {meant[0]}?" if meant else ""
            raise InputError(f"{key!r} is no key of a grid; there are {', '.join(KEYS)}{hint}")
    return content


def _grid(path: Path, content: dict[str, Any]) -> Grid:
    evaluate = content.get("evaluate")
    if evaluate is not None and not isinstance(evaluate, str):
        raise InputError(f"evaluate: {evaluate!r} is not the path of a checkpoint")
    if "base" not in content and evaluate is None:
        raise InputError("base: is missing; name the experiment to start from, such as experiments/mini_voc.yaml")
    axes = _axes(content.get("axes"))
    grid = Grid(
        path=path,
        base=_base(path, content["base"]) if "base" in content else None,
        evaluate=evaluate,
        axes=axes,
        seeds=_seeds(content.get("seeds", [0])),
        exclude=tuple(_labels(axes, item, "exclude") for item in _list(content.get("exclude", []), "exclude")),
        overrides=_options(content.get("overrides") or {}, "overrides"),
    )
    _check_options(grid.overrides, "overrides")
    for axis in axes:
        for option in sorted(grid.overrides.keys() & axis.options):
            if all(option in one for one in axis.values.values()):
                raise InputError(f"overrides: {option} is set by each value of the axis {axis.name}, too")
    settings = {setting_name(setting) for setting in grid.settings()}
    if not settings:
        raise InputError("exclude: leaves no cell")
    baseline = None
    if content.get("baseline") is not None:
        baseline = _setting(axes, content["baseline"], settings, "baseline")
    paper = {
        _setting(axes, key, settings, "paper"): _fraction(key, value)
        for key, value in _mapping(content.get("paper", {}), "paper", "cell: published number").items()
    }
    return replace(grid, baseline=baseline, paper=paper)


def _base(path: Path, base: Any) -> Path:
    """Find the experiment, relative to the working directory or else to a folder above the grid file."""
    if not isinstance(base, str):
        raise InputError(f"base: {base!r} is not the path of an experiment")
    for folder in (Path(), *path.absolute().parents):
        if os.path.isfile(folder / base):  # False, too, for what can be no name
            return folder / base
    raise InputError(f"base: {base}: no such file, neither here nor above the grid file")


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = _list(value, "seeds")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise InputError(f"seeds: {seed!r} is not a whole number from 0 on")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds: {seeds} must hold at least one seed, and each once")
    return tuple(seeds)


def _axes(value: Any) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    wanted = "an axis each, such as model.anchors.scales: [[8], [16]]"
    for key, content in _mapping(value or {}, "axes", wanted).items():
        axis = _axis(str(key), content)
        for other in axes:
            if other.name == axis.name:
                raise InputError(
                    f"axes: two are called {axis.name}; give one of them a name: {{option: ..., values: ...}}"
                )
            for option in sorted(other.options & axis.options):
                raise InputError(f"axes: {option} is set by both {other.name} and {axis.name}")
        axes.append(axis)
    return tuple(axes)


def _axis(key: str, content: Any) -> Axis:
    """Read `option: values` or `name: {option: ..., values: ...}`; without `option` each value is a mapping of some."""
    name, where = _name(key.rsplit(".", 1)[-1], "axes"), f"axes.{key}"
    option, values = key, content
    if "." not in key:
        if name == "seed":
            raise InputError("axes.seed: seeds have a key of their own: seeds: [0, 1]")
        for unknown in _mapping(content, where, "option: and values:").keys() - {"option", "values"}:
            raise InputError(f"{where}: {unknown!r} is neither option nor values")
        if "values" not in content:
            raise InputError(f"{where}: values: is missing")
        option, values = content.get("option"), content["values"]
        if option is not None and not isinstance(option, str):
            raise InputError(f"{where}.option: {option!r} is not the name of an option, such as model.anchors.scales")
        where = f"{where}.values"
    elif isinstance(content, dict) and content.keys() <= {"option", "values"} and "values" in content:
        raise InputError(f"{where}: the name of an axis has no dots; write scales: {{option: {key}, ...}}")
    if isinstance(values, list) and option is not None:
        named = [(label_of(value), value) for value in values]
    elif isinstance(values, dict):
        named = [(_name(str(label), where), value) for label, value in values.items()]
    elif option is None:
        raise InputError(f"{where}: without option:, give a mapping, name -> options that it sets")
    else:
        raise InputError(f"{where}: {values!r} is not a list of values, nor a mapping, name -> value")
    if not named:
        raise InputError(f"{where}: is empty; give at least one value")
    found: dict[str, Options] = {}
    for label, value in named:
        if not label or len(label) > LONGEST_LABEL:
            raise InputError(f"{where}: {value!r} needs a short name: values: {{small: {value!r}, ...}}")
        if label in found:
            raise InputError(f"{where}: two values are called {label}")
        found[label] = {option: value} if option is not None else _options(value, f"{where}.{label}")
        _check_options(found[label], where)
    return Axis(name, found, dict(named))


def _options(value: Any, where: str) -> Options:
    """Return option -> value, from keys with dots or nested ones."""
    return flat_options(_mapping(value, where, "option: value"))


def _check_options(options: Options, where: str) -> None:
    ours = {
        "seed_everything": "is set by seeds:",
        "ckpt_path": "is set by frcnn ablate",
        "config": "is set by base:",
        "runs_dir": "is an option of frcnn ablate",
        "experiment": "is set by the grid's file name",
        "run_name": "is set by the cell's name",
    }
    for option in options:
        if option in ours:
            raise InputError(f"{where}: {option} {ours[option]}")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", option):
            raise InputError(f"{where}: {option!r} is not the name of an option, such as model.anchors.scales")


def _labels(axes: Sequence[Axis], value: Any, where: str) -> dict[str, str]:
    """Return axis -> label, from a mapping of labels or values, or a text such as `scales=8,ratios=1`."""
    if isinstance(value, str):
        pairs = [part.split("=", 1) for part in value.split(",")]
        if any(len(pair) < 2 for pair in pairs):
            raise InputError(f"{where}: {value!r} is not written as axis=value,axis=value")
        value = dict(pairs)
    by_name = {axis.name: axis for axis in axes}
    labels: dict[str, str] = {}
    for name, wanted in _mapping(value, where, "axis: value").items():
        if name not in by_name:
            raise InputError(f"{where}: {name!r} is no axis; there are {', '.join(by_name)}")
        axis = by_name[name]
        text = label_of(wanted)
        same = [label for label in axis.values if label == text or axis.given[label] == wanted]
        if not same:
            raise InputError(f"{where}: {wanted!r} is no value of {name}; there are {', '.join(axis.values)}")
        labels[name] = same[0]
    return {axis.name: labels[axis.name] for axis in axes if axis.name in labels}


def _setting(axes: Sequence[Axis], value: Any, settings: set[str], where: str) -> str:
    name = setting_name(_labels(axes, value, where))
    if name not in settings:
        raise InputError(f"{where}: {value!r} is not one cell; give a value of every axis, such as {min(settings)}")
    return name


def _fraction(key: Any, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"paper.{key}: {value!r} is not a fraction in 0..1, such as 0.699")
    return float(value)


def _name(text: str, where: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", text):
        raise InputError(f"{where}: {text!r} becomes part of a folder's name; use letters, digits and . _ + -")
    return text


def _mapping(value: Any, where: str, wanted: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {value!r} is not a mapping ({wanted})")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where}: {value!r} is not a list")
    return value
