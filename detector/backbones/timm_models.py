"""What timm knows of its models, and their layers: the ones that are a row of stages and take images of any size."""

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from detector.errors import InputError, listed
from detector.state_dicts import first_line

Levels = Literal["fpn", "single"]
KEY = "backbone.model"
_FINEST, _SINGLE = 4, 16  # strides: of an FPN's first level, and of a single one


class TimmModel(NamedTuple):
    """What is known of a model before it is built.

    Attributes:
        strides: Of the maps that are used, fine to coarse.
        channels: Of these maps.
        maps: The indices, in timm, of the maps up to the last one that is used; each ends a stage.
        batch_norm: Whether its layers have batch norm.
        pretrained: Whether timm has weights of it.
        mean: Subtracted from the images that it was trained on, RGB in 0..1.
        std: Divided by, likewise.
        published: The model and the tag of its weights, and the address at which they are.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]
    maps: tuple[int, ...]
    batch_norm: bool
    pretrained: bool
    mean: list[float]
    std: list[float]
    published: tuple[str, str]


def library() -> Any:
    """Return timm.

    Raises:
        InputError: It is not installed.
    """
    try:
        return import_module("timm")
    except ImportError as error:
        raise InputError(
            f"backbone.name timm: timm cannot be imported ({error}); pip install 'faster-rcnn-lightning[timm]'"
        ) from error


@cache
def timm_model(name: str | None, levels: Levels) -> TimmModel:
    """Return what is known of a model, by timm's name, with or without the tag of its weights.

    Raises:
        InputError: timm is not installed, has no such model, or its stages do not fit a detector.
    """
    timm = library()
    if name is None or not timm.is_model(name):
        near = get_close_matches(name or "", timm.list_models(), 5)
        hint = f"; close to it: {', '.join(near)}" if near else ", such as convnext_tiny, resnet50 or efficientnet_b0"
        raise InputError(f"{KEY} {name or 'null'}: give a name of timm.list_models(){hint}")
    try:
        with torch.device("meta"):
            network = build_features(name)
    except (RuntimeError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        tags = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        known = f"; tags of its weights: {listed(tags)}" if "." in name and tags else ""
        raise InputError(f"{KEY} {name}: timm makes no feature maps of it ({first_line(error)}){known}") from error
    info, config = network.feature_info, network.pretrained_cfg
    every = tuple(info.reduction())
    wanted = [place for place, stride in enumerate(every) if stride >= _FINEST]
    if levels == "single":
        wanted = [place for place in wanted if every[place] == _SINGLE][-1:]
    if not wanted:
        raise InputError(f"{KEY} {name}: has maps of strides {every}, none of {_SINGLE}; use backbone.levels fpn")
    _check_shapes(name, network, every)
    identity, address = config.get("hf_hub_id"), config.get("url") or "its address"
    file = f"https://huggingface.co/{identity}/resolve/main/model.safetensors" if identity else address
    return TimmModel(
        strides=tuple(every[place] for place in wanted),
        channels=tuple(info.channels()[place] for place in wanted),
        maps=tuple(info.out_indices)[: wanted[-1] + 1],
        batch_norm=any(isinstance(module, nn.BatchNorm2d) for module in network.modules()),
        pretrained=timm.models.is_model_pretrained(name),
        mean=[float(value) for value in config["mean"]],
        std=[float(value) for value in config["std"]],
        published=(".".join(filter(None, (name.partition(".")[0], config.get("tag")))), file),
    )


def build_features(name: str, maps: tuple[int, ...] | None = None, drop_path: float = 0.0) -> Any:
    """Build a model without its classifier, with random weights, for those maps; of Swin, one for any size of image."""
    options: dict[str, Any] = {"features_only": True}
    if maps is not None:
        options["out_indices"] = maps
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        return library().create_model(name, strict_img_size=False, **options)
    except TypeError:  # only networks that could be strict have that option
        return library().create_model(name, **options)


def stages_of(network: Any) -> list[list[str]]:
    """Return the names of the layers of each stage, in the order in which they are applied; a map ends a stage."""
    ends = {name.replace(".", "_") for name in network.feature_info.module_name()}
    stages: list[list[str]] = [[]]
    for name, child in network.named_children():
        parts = name == "blocks" and name not in ends  # of EfficientNets and MobileNets
        for layer in [f"{name}.{part}" for part, _ in child.named_children()] if parts else [name]:
            stages[-1].append(layer)
            if layer.replace(".", "_") in ends:
                stages.append([])
    return [stage for stage in stages[: len(ends)] if stage]


def names_in_files(name: str) -> dict[str, str]:
    """Return the names of a model's modules by those that they have under `build_features`."""
    with torch.device("meta"):
        whole = library().create_model(name)
    return {path.replace(".", "_"): path for path, _ in whole.named_modules()}


def maps_are_channels_last(network: Any) -> bool:
    """Return whether a model's maps are (B, h, w, channels)."""
    return str(getattr(network, "output_fmt", "")).endswith("NHWC")


def _check_shapes(name: str, network: Any, strides: tuple[int, ...]) -> None:
    """Apply the layers one after the other to an image of a size of its own, without memory.

    Raises:
        InputError: The network is no row of layers, or does not take images of any size.
    """
    height, width = 3 * strides[-1], 5 * strides[-1]
    maps = []
    try:
        with torch.device("meta"), torch.no_grad():
            x = torch.zeros(1, 3, height, width)
            for stage in stages_of(network.eval()):
                for layer in stage:
                    x = network.get_submodule(layer)(x)
                *others, last = x.shape[1:]
                maps.append((last, *others) if maps_are_channels_last(network) else (*others, last))
    except Exception as error:  # what any of a thousand models may say
        fixed = network.pretrained_cfg.get("fixed_input_size")
        why = f"takes images of {network.pretrained_cfg['input_size'][1:]} pixels alone" if fixed else first_line(error)
        raise InputError(
            f"{KEY} {name}: cannot be applied stage by stage to images of {height} x {width} pixels ({why}); a "
            "detector needs a network for any size, such as convnext_tiny, swin_tiny_patch4_window7_224 or resnet50"
        ) from error
    channels = network.feature_info.channels()
    expected = [(width_, height // stride, width // stride) for width_, stride in zip(channels, strides, strict=True)]
    if maps != expected or list(strides) != sorted(set(strides)):
        raise InputError(
            f"{KEY} {name}: its maps of {height} x {width} pixels are {maps}, not {expected}: each stage has to halve "
            "the one before, as of convnext_tiny, swin_tiny_patch4_window7_224 or resnet50"
        )
