"""torch.compile of the detector's networks: the same numbers, few graphs, and no trace in checkpoints and copies."""

import contextlib
import copy
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.errors import InputError
from detector.image_batch import ImageConfig
from detector.kernels.precision import replace_layers
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig, RPNHeadPart
from detector.training import compilation
from detector.training.compilation import check_compiler, check_deterministic, compilable, compile_networks
from detector.training.lightning_module import FasterRCNNModule

CPU = torch.device("cpu")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
MOST_GRAPHS = 1 if TORCH >= (2, 15) else 3
"""Of one network. Torch 2.11 compiles some for sizes up to the first one, and again for a greater one."""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile for the CPU with")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()
    check_compiler.cache_clear()


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made as always, and then run by torch's own kernels: in seconds, and without a compiler."""
    original = torch.compile

    def compile(*args: Any, options: Any = None, **keywords: Any) -> Any:
        return original(*args, **keywords, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile)


def detector(**options: Any) -> FasterRCNNModule:
    torch.manual_seed(0)
    backbone = {"name": "resnet18_fpn", "frozen_stages": 2, "fpn_channels": 16, "box_head_channels": 16}
    module = FasterRCNNModule(
        ["a", "b"],
        BackboneConfig(**backbone | options.pop("backbone", {})),
        AnchorConfig([1, 2], [0.5, 2], straddling="keep"),
        RPNConfig(post_nms_train=40, post_nms_test=20),
        RoIConfig(samples_per_image=16, score_threshold=0.0, detections_per_image=5),
        ImageConfig([160], 400),
        load_backbone_weights=False,
        **options,
    )
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.running_var.uniform_(0.5, 2.0)
            norm.running_mean.uniform_(-0.5, 0.5)
    return module


def batch(height: int, width: int, images: int = 2) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(height)
    pictures = [torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator) for _ in range(images)]
    target = {
        "boxes": torch.tensor([[5.0, 8, width - 40, height - 30]]),
        "labels": torch.tensor([2]),
        "difficult": torch.tensor([False]),
    }
    return pictures, [target] * images


def train_step(module: FasterRCNNModule, images: list[Tensor], targets: list[Any]) -> tuple[dict[str, float], Any]:
    torch.manual_seed(1)
    module.train().zero_grad()
    losses = module.model.losses(images, targets)
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


@pytest.mark.parametrize(
    "backbone",
    [{}, {"name": "small_c4", "weights": None, "frozen_stages": 0, "checkpoint_gradients": True}],
    ids=["frozen norms", "trained norms, checkpointed"],
)
def test_one_graph_each_for_all_sizes(traced_only: None, backbone: dict[str, Any]) -> None:
    """Three networks: three graphs for training, and three for evaluation. Frozen stages and norms stay frozen."""
    eager, module = detector(backbone=backbone), detector(backbone=backbone, compile="default")
    compile_networks(compilable(module), module.compile_mode, CPU)
    counters.clear()
    for size in ((160, 240), (200, 170), (300, 200), (161, 390)):
        losses, gradients = train_step(module, *batch(*size))
        expected, their_gradients = train_step(eager, *batch(*size))
        assert losses == pytest.approx(expected, rel=1e-5)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    assert 3 <= counters["stats"]["unique_graphs"] <= 3 * MOST_GRAPHS
    assert not counters["graph_break"]
    for size in ((160, 240), (200, 170), (300, 200)):
        with torch.no_grad():
            found, expected_detections = module.eval()(batch(*size)[0]), eager.eval()(batch(*size)[0])
        for ours, theirs in zip(found, expected_detections, strict=True):
            assert len(ours["labels"]) > 0
            for key, value in ours.items():
                torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-3)
    assert 6 <= counters["stats"]["unique_graphs"] <= 6 * MOST_GRAPHS
    states = eager.state_dict(), module.state_dict()
    assert list(states[0]) == list(states[1])
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, msg=key)


def test_copies_and_pickles_are_not_compiled(traced_only: None) -> None:
    module = detector(compile="default")
    compile_networks(compilable(module), module.compile_mode, CPU)
    assert module.model.backbone._compiled_call_impl is not None
    for again in (copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model))):
        assert again.backbone._compiled_call_impl is None
    assert "compile" not in module.hparams
    graphs = module.model.backbone._compiled_call_impl
    compile_networks(compilable(module), module.compile_mode, CPU)  # a second stage on the same module
    assert module.model.backbone._compiled_call_impl is graphs


def test_both_networks_of_alternating_training() -> None:
    module = detector(training_scheme="alternating", compile="default")
    assert module.alternating is not None and module.alternating.proposer is not None
    parts = compilable(module)
    assert len({id(part) for part in parts}) == 5
    assert any(part is module.alternating.proposer.backbone for part in parts)


class OwnHead(RPNHeadPart):
    def build(self, in_channels: int, anchors_per_location: Any, config: RPNConfig) -> nn.Module:
        return nn.Conv2d(in_channels, 5 * anchors_per_location[0], 1)


def test_a_head_of_ones_own_is_compiled() -> None:
    module = FasterRCNNModule(["a"], BackboneConfig("small_c4", None, frozen_stages=0), rpn=RPNConfig(head=OwnHead()))
    expected = module.model.rpn.head, module.model.backbone, module.model.roi_heads.box_head
    assert isinstance(expected[0], nn.Conv2d)
    assert {id(part) for part in compilable(module)} == {id(part) for part in expected}


def test_none_compiles_nothing() -> None:
    module = detector()
    compile_networks(compilable(module), module.compile_mode, CPU)
    assert all(part._compiled_call_impl is None for part in compilable(module))


def test_unknown_mode() -> None:
    with pytest.raises(InputError, match=r"^compile fast: choose none, default or max-autotune"):
        detector(compile="fast")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nSet ...")

    monkeypatch.setattr(compilation, "_trivial", lambda x: x)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    check_compiler.cache_clear()
    with pytest.raises(InputError) as error:
        compile_networks([nn.Linear(2, 2)], "default", CPU)
    assert "\n" not in str(error.value)
    assert "InvalidCxxCompiler: No working C++ compiler found" in str(error.value)
    assert "give compile none" in str(error.value)


class Gpus:
    """Stand-ins for what trying the compiler asks of CUDA; note the current device, and where tensors are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, works: bool = True) -> None:
        self.current = 0
        self.asked: list[tuple[int, str]] = []
        self.works = works
        monkeypatch.setattr(torch.cuda, "device", self.set_current)
        monkeypatch.setattr(torch, "ones", lambda *_, device: self.asked.append((self.current, str(device))))
        monkeypatch.setattr(torch, "compile", lambda *_, **__: self.run)

    @contextlib.contextmanager
    def set_current(self, device: torch.device) -> Iterator[None]:
        self.current = device.index
        yield
        self.current = 0

    def run(self, _: Any) -> None:
        if not self.works:
            raise RuntimeError("Cannot find a working triton installation")


def test_the_compiler_is_tried_on_the_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch)
    for _ in range(2):
        check_compiler(torch.device("cuda", 3))
    assert gpus.asked == [(3, "cuda:3")]


@pytest.mark.parametrize(
    ("pooling", "works", "refusal"),
    [
        ("roi_pool", True, "trainer.deterministic true: roi.pooling roi_pool has no deterministic gradient on CUDA"),
        ("roi_pool_floor", True, "trainer.deterministic true: roi.pooling roi_pool_floor has no deterministic"),
        ("roi_align", True, None),
        ("roi_align", False, "trainer.deterministic true, roi.pooling roi_align: nothing can be compiled for the cuda"),
        ("roi_align_legacy", False, "trainer.deterministic true, roi.pooling roi_align_legacy: nothing can be"),
    ],
)
def test_what_has_no_deterministic_gradient_is_refused(
    monkeypatch: pytest.MonkeyPatch, pooling: str, works: bool, refusal: str | None
) -> None:
    gpus, device = Gpus(monkeypatch, works), torch.device("cuda", 1)
    check_deterministic(pooling, device)  # not asked for
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    check_deterministic(pooling, device)
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: False)
    check_deterministic(pooling, CPU)
    assert gpus.asked == []
    if refusal is None:
        check_deterministic(pooling, device)
    else:
        with pytest.raises(InputError) as error:
            check_deterministic(pooling, device)
        assert str(error.value).startswith(refusal) and "\n" not in str(error.value)
        assert str(error.value).endswith("or give trainer.deterministic warn")
    assert gpus.asked == ([(1, "cuda:1")] if pooling.startswith("roi_align") else [])


def test_code_of_another_processor_is_not_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key are the options: vectors of 16 numbers where the loop takes 8 at a time overwrite other memory."""
    chosen = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, options, **__: chosen.append(options))
    monkeypatch.setattr(compilation, "check_compiler", lambda _: None)
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        compile_networks([nn.Linear(2, 2)], "default", CPU)
    assert [options["cpp.simdlen"] for options in chosen] == [512, 256, None]


@needs_compiler
def test_compiled_kernels_of_folded_norms_and_dropout() -> None:
    """The real thing, on a network small enough to compile in seconds."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), FrozenBatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
    norm = network[1]
    assert isinstance(norm, FrozenBatchNorm2d)
    norm.running_var.uniform_(0.5, 2.0)
    replace_layers(network)
    assert norm.folded
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    eager = copy.deepcopy(network)
    compile_networks([network], "default", CPU)
    counters.clear()
    for size in ((160, 200), (120, 250), (301, 97)):
        x = torch.randn(2, 3, *size)
        found = []
        for net in (network, eager):
            torch.manual_seed(3)  # dropout draws the same units
            net.zero_grad()
            y = net(x)
            y.pow(2).sum().backward()
            weight = net[0].weight
            assert isinstance(weight, Tensor) and weight.grad is not None
            found.append((y.detach(), weight.grad.clone()))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-2)
    assert 1 <= counters["stats"]["unique_graphs"] <= MOST_GRAPHS
