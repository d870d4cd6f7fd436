"""Train the small detector of the second part of notebook 01 again: `python notebooks/train_detector.py`.

It is `experiments/mini_voc.yaml` with smaller heads and more epochs. What goes into the package are its averaged
weights alone, those of convolutions and linear layers in float16: 1.9 MB. The training takes eight minutes of one core
with AVX-512 BF16.
"""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "experiments/weights/mini_voc.ckpt"
KEPT = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters")
COMMANDS = (
    "mini-voc data/mini_voc --images 2000",
    "fit --config experiments/mini_voc.yaml --experiment mini_voc --run_name notebook --model.backbone.pool_size 4 "
    "--model.backbone.box_head_channels 64 --model.rpn.hidden_channels 64 "
    "--trainer.max_epochs 20 --trainer.check_val_every_n_epoch 20",
    "test --ckpt_path runs/mini_voc/notebook/checkpoints/last.ckpt",
)


def shrink(path: Path, target: Path) -> None:
    """Write what detecting needs of a checkpoint, as a checkpoint that every command takes."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor.clone()
        for name, tensor in checkpoint["state_dict"].items()
    }
    torch.save({key: checkpoint[key] for key in KEPT} | {"state_dict": state}, target)


if __name__ == "__main__":
    for command in COMMANDS:
        print(f"$ frcnn {command}", flush=True)
        subprocess.run([sys.executable, "-m", "experiments.cli", *command.split()], check=True, cwd=ROOT)
    shrink(ROOT / "runs/mini_voc/notebook/checkpoints/last.ckpt", TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
