"""`frcnn replay`: a step that ended a training, run again on its own batches under anomaly detection."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor

from detector.errors import InputError, brief, printable
from detector.kernels.cpu_paths import use_cpu_kernels
from detector.parts import say_strangers
from detector.training.checkpoint_content import check_state, read_checkpoint
from detector.training.finite import first_not_finite
from detector.training.lightning_module import FasterRCNNModule
from experiments.run.options import ReplayOptions


def replay(options: ReplayOptions) -> None:
    """Run the step of a dump again, and print its losses beside those of the run, and where they cease to be finite.

    Raises:
        InputError: The file is no dump.
    """
    dump = read_checkpoint(options.dump)
    if "replay" not in dump:
        raise InputError(f"{options.dump}: a checkpoint, and no dump of a step; a training writes nonfinite_step<N>.pt")
    say_strangers(options.dump, dump["hyper_parameters"])
    module = FasterRCNNModule(**dump["hyper_parameters"], load_backbone_weights=False)
    check_state(options.dump, dump["state_dict"], module.state_dict())
    module.scheme.restore(dump, module)
    module.load_state_dict(dump["state_dict"])
    step = dump["replay"]
    device = step["device"] if step["device"] != "cuda" or torch.cuda.is_available() else "cpu"
    module.train().to(device)
    use_cpu_kernels(step["cpu_kernels"])
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    bad = first_not_finite(weights)
    largest = max(weights, key=lambda name: float(weights[name].abs().max()))
    state = f"not finite, first {bad}" if bad else "finite"
    print(f"weights before step {step['step']}: {state}; largest {weights[largest].abs().max():.4g}, of {largest}")
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(step["precision"].partition("-")[0])
    for batch in step["batches"]:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            _run(module, move_data_to_device(batch, device))


def _run(module: FasterRCNNModule, batch: Mapping[str, Any]) -> None:
    """Compute losses and gradients of a batch, as the training did, and print them."""
    seen: list[str] = []

    def look(name: str, layer: torch.nn.Module, output: Any) -> None:
        if not seen and not all(tensor.isfinite().all() for tensor in _floats(output)):
            seen.append(f"{name} ({type(layer).__name__})")

    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
        for name, layer in module.named_modules()
    ]
    torch.manual_seed(batch["seed"])
    with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
        losses = module.scheme.losses(batch["images"], batch["targets"])
        try:
            losses["loss"].backward()
            gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            bad = first_not_finite(gradients)
            anomaly = f"the gradient of {bad} is not finite" if bad else "all gradients are finite"
        except RuntimeError as error:
            anomaly = brief(error)
    for hook in hooks:
        hook.remove()
    images = ", ".join(printable(target.get("file_name", "not known")) for target in batch["targets"])
    print(f"images: {images}")
    table = Table("loss", "in the run", "again")
    for name, before in batch["losses"].items():
        table.add_row(name, f"{before:.6g}", f"{losses[name].detach():.6g}")
    Console(highlight=False).print(table)
    print(f"first output that is not finite: {seen[0] if seen else 'none'}")
    print(f"backward: {anomaly}")
    lines = [line for one in caught for line in str(one.message).splitlines() if "/detector/" in line]
    if lines:
        print(f"  its operation: {lines[-1].strip()}")


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _floats(item)
