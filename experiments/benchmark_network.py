"""`frcnn benchmark train|infer`: a step of our detector beside one of torchvision's with the same network and weights.

Both get the same images, options and random weights, and run in turn in one process, so that whatever else the machine
does befalls both. Images have the size that the network sees, so none is resized. Ours are uint8, as they come from the
loader; torchvision's are floats in 0..1 already, as its reference scripts make them in the loader.

Random weights are made like trained ones where that costs time: batch norm has the statistics of these images, and the
background's score is such that about `CANDIDATES` boxes of an image pass the score threshold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final, Literal, cast

import torch
import torchvision
from torch import Tensor, nn

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig, BackboneName
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig
from detector.optimization import OptimizerConfig, build_optimizer, parameter_groups
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from experiments.benchmark import Benchmark, Case, processor
from experiments.step_parts import NETWORK_PARTS, inference_parts, synchronize, training_parts
from experiments.torchvision_peer import NAME, build_peer

CLASSES: Final = 20
OBJECTS: Final = 6
CANDIDATES: Final = 300
Kind = Literal["train", "infer"]
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
DTYPES: Final = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class NetworkOptions:
    """A detector without its weights, and the size of its images (height, width)."""

    size: tuple[int, int]
    backbone: BackboneConfig
    anchors: AnchorConfig
    rpn: RPNConfig
    roi: RoIConfig
    image: ImageConfig
    difficult: Literal["drop", "keep", "ignore"] = "drop"


@dataclass(frozen=True)
class Setting:
    """How the networks are run.

    Args:
        kind: Training steps or inferences.
        device: Of both networks.
        repeats: Timed rounds; of each, the median counts.
        compile: Whether ours is compiled.
    """

    kind: Kind
    device: torch.device
    repeats: int
    compile: bool = False


@dataclass
class Program:
    """A network that can be run on a batch again and again, and its times in milliseconds."""

    run: Callable[[], object]
    times: list[float] = field(default_factory=list)


NETWORKS: Final[dict[str, tuple[int, int]]] = {
    "vgg16": (600, 800),
    "resnet50_fpn": (600, 800),
    "resnet18_fpn": (320, 416),
    "mobilenet_v2_fpn": (320, 416),
}


def standard_options(name: BackboneName, size: tuple[int, int]) -> NetworkOptions:
    """torchvision's defaults for a network with one feature level or a pyramid."""
    pyramid = name.endswith("fpn")
    scales: list[Any] = [[32], [64], [128], [256], [512]] if pyramid else [128, 256, 512]
    return NetworkOptions(
        size,
        BackboneConfig(name=name, frozen_stages=2),
        AnchorConfig(
            scales=scales,
            aspect_ratios=[0.5, 1, 2],
            base_size=1,
            center_offset="zero",
            spacing="fitted",
            rounding="nearest",
            straddling="keep",
        ),
        RPNConfig(pre_nms_train=2000, post_nms_train=2000, pre_nms_test=1000, post_nms_test=1000),
        RoIConfig(samples_per_image=512, pooling="roi_align_legacy", reg_beta=1 / 9, nms_iou=0.5),
        ImageConfig(shortest_side=[min(size)], longest_side=max(size)),
    )


def chosen_networks(
    networks: Sequence[str] | None, config: str | None, options: Sequence[str] = ()
) -> list[tuple[str, NetworkOptions]]:
    """Networks by name, all where none is named, or that of an experiment's file with `KEY=VALUE` options.

    Raises:
        InputError: An unknown name, both or an unreadable file, or a bad option.
    """
    if config is None:
        if options:
            raise InputError(f"--option {options[0]}: is for --config")
        for name in networks or ():
            if name not in NETWORKS:
                raise InputError(f"--networks: {name!r} is none of {', '.join(NETWORKS)}; give others by --config")
        return [(name, standard_options(cast(BackboneName, name), NETWORKS[name])) for name in networks or NETWORKS]
    if networks:
        raise InputError("--networks and --config: give one of them")
    from experiments.parsed_options import OptionsCLI

    parsed = OptionsCLI(["--config", config, *(f"--{option}" for option in options)], prog="frcnn benchmark").config
    model = parsed.model
    image = ImageConfig(**model.image.as_dict())
    shortest = image.shortest_side[-1]
    size = (shortest, min(image.longest_side, shortest * 4 // 3))
    chosen = NetworkOptions(
        size,
        BackboneConfig(**model.backbone.as_dict()),
        AnchorConfig(**model.anchors.as_dict()),
        RPNConfig(**model.rpn.as_dict()),
        RoIConfig(**model.roi.as_dict()),
        image,
        model.difficult,
    )
    return [(Path(config).stem, chosen)]


def make_images(size: tuple[int, int], number: int, objects: int, device: torch.device) -> Batch:
    """Images (3, H, W) uint8 of coarse noise with rectangles of other noise, and targets of these rectangles."""
    rng = torch.Generator().manual_seed(0)
    height, width = size
    images, targets = [], []
    for index in range(number):
        coarse = torch.rand(1, 3, height // 16, width // 16, generator=rng) * 255
        image = nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
        extent = torch.tensor([width, height]).repeat(2)
        sides = 0.08 + 0.5 * torch.rand(objects, 2, generator=rng) ** 2
        corners = torch.rand(objects, 2, generator=rng) * (1 - sides)
        boxes = torch.cat((corners, corners + sides), dim=1) * extent
        for x1, y1, x2, y2 in boxes.int().tolist():
            patch = image[:, y1:y2, x1:x2]
            patch.copy_((patch + 128 * torch.rand(3, 1, 1, generator=rng)).clamp(max=255))
        images.append(image.to(torch.uint8).to(device))
        labels = torch.randint(1, CLASSES + 1, (objects,), generator=rng)
        target = {"boxes": boxes, "labels": labels, "difficult": torch.zeros(objects, dtype=torch.bool)}
        targets.append({key: value.to(device) for key, value in target.items()} | {"image_id": torch.tensor(index)})
    return images, targets


def build_network(options: NetworkOptions, batch: Batch) -> tuple[FasterRCNN, BackboneConfig]:
    """Our detector with random weights on the CPU, and the backbone's options with them."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        backbone = options.backbone
        if not backbone.random:
            backbone = replace(backbone, weights=str(_random_weights(backbone, batch, Path(folder))))
        model = FasterRCNN(
            CLASSES, backbone, options.anchors, options.rpn, options.roi, options.image, options.difficult
        )
    _set_background_score(model.eval(), [image.cpu() for image in batch[0][:1]])
    return model.to(memory_format=torch.channels_last), backbone


def _random_weights(config: BackboneConfig, batch: Batch, folder: Path) -> Path:
    """A file of random weights of the classification network, with the batch norm's statistics of the images."""
    network = torchvision.models.get_model(config.name.removesuffix("_fpn").removesuffix("_c4"), weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        image = batch[0][0].cpu().float()[None]
        network.train()((image - image.mean()) / image.std())
    path = folder / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@torch.no_grad()
def _set_background_score(model: FasterRCNN, images: list[Tensor]) -> None:
    """Scores of classes that differ as a trained detector's, and a bias of the background by bisection."""
    features, batch = model.features(images)
    proposals = model.proposals(features, batch)
    scores = model.roi_heads.predictor.scores
    logits, _ = model.roi_heads(features, proposals)
    scores.weight.mul_(2.0 / logits.std())
    logits, _ = model.roi_heads(features, proposals)
    low, high = 0.0, 50.0
    for _ in range(30):
        middle = (low + high) / 2
        logits[:, 0] += middle
        found = int((logits.softmax(1)[:, 1:] > model.roi_heads.config.score_threshold).sum())
        logits[:, 0] -= middle
        low, high = (middle, high) if found > CANDIDATES else (low, middle)
    scores.bias[0] = low


def our_program(model: FasterRCNN, batch: Batch, precision: str, setting: Setting) -> Program:
    """A training step, or an inference, of our detector."""
    images, targets = batch
    if setting.kind == "infer":

        def infer() -> object:
            with torch.inference_mode(), autocast(precision, setting.device):
                return model(images)

        return Program(infer)
    optimizer = our_optimizer(model)

    def step() -> None:
        with autocast(precision, setting.device):
            loss = model.losses(images, targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Program(step)


def our_optimizer(model: FasterRCNN) -> torch.optim.Optimizer:
    """SGD as in training, with so small a learning rate that the weights stay what they are."""
    config = OptimizerConfig(lr=1e-8)
    return build_optimizer(parameter_groups(model, [], config), config)


def peer_program(peer: nn.Module, batch: Batch, precision: str, setting: Setting) -> Program:
    """The same of torchvision's detector."""
    images = [image.float() / 255 for image in batch[0]]
    if setting.kind == "infer":

        def infer() -> object:
            with torch.inference_mode(), autocast(precision, setting.device):
                return peer(images)

        return Program(infer)
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-8, momentum=0.9, weight_decay=0.0005)

    def step() -> None:
        with autocast(precision, setting.device):
            loss = sum(peer(images, batch[1]).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[attr-defined]
        optimizer.step()

    return Program(step)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which Lightning runs a step of this precision."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def run_in_turn(programs: Sequence[Program], device: torch.device, repeats: int, seconds: float = 3.0) -> None:
    """Time all programs one after the other, round by round, after one round of warm-up.

    There are `repeats` rounds, or more where they are short: up to five times as many, until all took `seconds`.
    """
    for _ in range(2):
        start = perf_counter()
        for program in programs:
            program.run()
        synchronize(device)
        one_round = perf_counter() - start
    rounds = max(repeats, min(5 * repeats, int(seconds / one_round)))
    for number in range(rounds):
        order = programs if number % 2 == 0 else programs[::-1]
        for program in order:
            synchronize(device)
            start = perf_counter()
            program.run()
            synchronize(device)
            program.times.append(1000 * (perf_counter() - start))


def benchmark_network(
    kind: Kind,
    networks: Sequence[tuple[str, NetworkOptions]],
    batch_sizes: Sequence[int] = (1, 4),
    precisions: Sequence[str] = ("32-true", "bf16-mixed"),
    peer: bool = True,
    repeats: int = 5,
    compile: bool = False,
    report: Callable[[Case], object] = lambda case: None,
) -> Benchmark:
    """Time our detector and torchvision's for each network, number of images and precision.

    A precision other than float32 is also compared with torchvision's float32, which is how its users run it.

    Args:
        kind: Training steps or inferences.
        networks: Name and options of each.
        batch_sizes: Images per step.
        precisions: As Lightning names them.
        peer: Whether torchvision's detector runs too.
        repeats: Timed rounds.
        compile: Whether ours is compiled.
        report: Is told of each case as soon as it is measured.

    Raises:
        InputError: A number out of range, an unknown precision, or options that torchvision does not have.
    """
    if repeats < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"--repeats {repeats} and --batch_sizes {list(batch_sizes)}: must be at least 1")
    for precision in precisions:
        if precision not in DTYPES:
            raise InputError(f"--precisions: {precision!r} is none of {', '.join(DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(kind, device, repeats, compile)
    cases: list[Case] = []
    for name, options in networks:
        for number in batch_sizes:
            for case in _cases(name, options, number, precisions, peer, setting):
                cases.append(case)
                report(case)
    title = "one training step" if kind == "train" else "one inference"
    return Benchmark(
        f"{title} in milliseconds, of networks with random weights on images of {OBJECTS} objects",
        _device_name(device),
        cases,
        ("torch", "torchvision", "numpy"),
    )


def _cases(
    name: str,
    options: NetworkOptions,
    number: int,
    precisions: Sequence[str],
    peer: bool,
    setting: Setting,
) -> list[Case]:
    """Ours against torchvision's in the same precision, and against its float32."""
    batch = make_images(options.size, number, OBJECTS, setting.device)
    model, backbone = build_network(options, batch)
    other = build_peer(model, backbone).to(setting.device).train(setting.kind == "train") if peer else None
    model = model.to(setting.device).train(setting.kind == "train")
    if setting.compile:
        for part in (model.backbone, model.rpn.head, model.roi_heads.box_head):
            part.compile()
    ours = {precision: our_program(model, batch, precision, setting) for precision in precisions}
    theirs = {p: peer_program(other, batch, p, setting) for p in precisions} if other is not None else {}
    run_in_turn([*ours.values(), *theirs.values()], setting.device, setting.repeats)
    title = f"{name} {options.size[0]}x{options.size[1]}, batch {number}"
    cases = []
    for precision in precisions:
        parts = _parts(model, batch, precision, setting)
        spent, total = median(ours[precision].times), sum(parts.values())
        case = Case(
            f"{title}, {precision}",
            spent,
            None,
            {part: time / total for part, time in parts.items()},
            ours_per_s=1000 * number / spent,
            times_the_limit=spent / sum(parts.get(part, 0.0) for part in NETWORK_PARTS),
        )
        against = [other for other in dict.fromkeys((precision, "32-true")) if other in theirs]
        for other_precision in against:
            time = median(theirs[other_precision].times)
            name = NAME if other_precision == precision else f"{NAME} in {other_precision}"
            parts_once = case.parts if other_precision == against[0] else {}
            cases.append(replace(case, peer=name, peer_ms=time, peer_per_s=1000 * number / time, parts=parts_once))
        if not against:
            cases.append(case)
    return cases


def _parts(model: FasterRCNN, batch: Batch, precision: str, setting: Setting) -> dict[str, float]:
    """Median milliseconds of each part."""
    images, targets = batch
    optimizer = our_optimizer(model) if setting.kind == "train" else None

    def once() -> dict[str, float]:
        context = autocast(precision, setting.device)
        if optimizer is None:
            return inference_parts(model, images, context)
        return training_parts(model, images, targets, optimizer, context)

    once()
    measured = [once() for _ in range(min(3, setting.repeats))]
    return {part: median(times[part] for times in measured) for part in measured[0]}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {processor()}, {torch.get_num_threads()} threads"
