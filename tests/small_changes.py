"""Do the tests notice small changes, of the kind that real bugs are? `make small_changes` asks, 30 times.

Each change is made alone, in a copy of the tree; the tests that it names are to fail. Exit status 1 where more than two
changes go unnoticed, or where one no longer fits the code. `python tests/small_changes.py 3 14` tries those two alone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
UNNOTICED = 2


class Change(NamedTuple):
    """One line of a file, another one in its place, and the test files that are to notice it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


CHANGES = (
    Change(  # wrong axis
        "detector/anchors.py",
        "[(height // rows, width // columns) for rows, columns in sizes]",
        "[(width // columns, height // rows) for rows, columns in sizes]",
        ("tests/detector/test_anchors.py",),
    ),
    Change(  # a clamp is missing
        "detector/boxes.py",
        "halves = 0.5 * units * deltas[..., 2:].clamp(max=MAX_LOG_RATIO).exp_()",
        "halves = 0.5 * units * deltas[..., 2:].exp()",
        ("tests/detector/test_boxes.py",),
    ),
    Change(  # NMS over all levels together
        "detector/kernels/nms.py",
        "score[of], levels[of], iou)",
        "score[of], 0 * levels[of], iou)",
        ("tests/detector/test_rpn.py",),
    ),
    Change(  # an object's best anchor may be one that is not used
        "detector/rpn.py",
        "torch.where(mask[:, None], far, anchors)",
        "anchors",
        ("tests/detector/test_rpn.py",),
    ),
    Change(  # difficult objects' boxes as background samples
        "detector/roi_heads.py",
        'if difficult != "keep":',
        'if difficult == "ignore":',
        ("tests/detector/test_roi_heads.py",),
    ),
    Change(  # one IoU for another
        "detector/assignment/matching.py",
        "near_difficult = ((overlap >= self.near) & difficult[..., None]).any(dim=-2)",
        "near_difficult = ((overlap >= self.positive_from) & difficult[..., None]).any(dim=-2)",
        ("tests/detector/assignment/test_matching.py",),
    ),
    Change(  # a wrong denominator
        "detector/losses.py",
        "weights[0] = objects / (len(labels) - objects).clamp(min=1)",
        "weights[0] = objects / max(len(labels), 1)",
        ("tests/detector/test_losses.py", "tests/detector/test_roi_heads.py"),
    ),
    Change(  # suppression across classes
        "detector/post_processing.py",
        "remaining = torch.where(found.labels == found.labels[best], remaining * factor, remaining)",
        "remaining = remaining * factor",
        ("tests/detector/test_post_processing.py",),
    ),
    Change(  # the last size is never drawn
        "detector/image_batch.py",
        "sides[int(torch.randint(len(sides), (1,)))]",
        "sides[int(torch.randint(len(sides) - 1, (1,)))]",
        ("tests/detector/test_image_batch.py",),
    ),
    Change(  # height and width swapped
        "detector/roi_pooling.py",
        "[width - 1, height - 1, width - 1, height - 1]",
        "[height - 1, width - 1, height - 1, width - 1]",
        ("tests/detector/test_roi_pooling.py",),
    ),
    Change(  # rounded down instead of up
        "detector/metrics/voc_ap.py",
        "needed = -(-np.arange(11) * npos // 10)",
        "needed = np.arange(11) * npos // 10",
        ("tests/detector/metrics/test_voc_ap.py",),
    ),
    Change(  # < for <=
        "detector/metrics/proposal_recall.py",
        "(area >= low) & (area <= high)",
        "(area >= low) & (area < high)",
        ("tests/detector/metrics/test_proposal_recall.py",),
    ),
    Change(  # the last image is never drawn
        "detector/metrics/bootstrap.py",
        "rng.integers(0, images, images)",
        "rng.integers(0, max(images - 1, 1), images)",
        ("tests/detector/metrics/test_bootstrap.py",),
    ),
    Change(  # off by one
        "detector/training/optimization.py",
        "batch >= batches - last else loss",
        "batch > batches - last else loss",
        ("tests/detector/training/test_optimization.py", "tests/detector/training/test_trainer_options.py"),
    ),
    Change(  # dropout in evaluation
        "detector/backbones/vgg16.py",
        "self.dropout, self.training)",
        "self.dropout)",
        ("tests/detector/backbones/test_backbones.py",),
    ),
    Change(  # one orientation for another
        "detector/use/reading.py",
        "if orientation in (2, 3, 6, 7):",
        "if orientation in (2, 3, 6, 8):",
        ("tests/detector/use/test_image_reading.py",),
    ),
    Change(  # the size of a turned picture
        "datamodules/detection_dataset.py",
        "header.upright_size if record.upright else (header.width, header.height)",
        "(header.width, header.height)",
        ("tests/datamodules/test_detection_dataset.py", "tests/datamodules/voc/test_any_dataset.py"),
    ),
    Change(  # nothing left to train on
        "datamodules/splits.py",
        "min(max(round(len(names) * val_fraction), 1), len(names) - 1)",
        "max(round(len(names) * val_fraction), 1)",
        ("tests/datamodules/test_splits.py",),
    ),
    Change(  # seed 0 in epoch 1 is seed 1 in epoch 0
        "datamodules/samplers.py",
        "np.random.SeedSequence([self.seed, epoch])).permutation(count)",
        "np.random.SeedSequence([self.seed + epoch])).permutation(count)",
        ("tests/datamodules/test_samplers.py",),
    ),
    Change(  # batches for samples
        "datamodules/samplers.py",
        'sampler.resume(state["epoch"], state["batches"] * state["batch_size"])',
        'sampler.resume(state["epoch"], state["batches"])',
        ("tests/datamodules/test_resuming.py",),
    ),
    Change(  # what earlier pastes covered is forgotten
        "datamodules/augmentation/mixing.py",
        "then = covered + np.clip(inner, 0, None).prod(1) / areas",
        "then = np.clip(inner, 0, None).prod(1) / areas",
        ("tests/datamodules/augmentation/test_mixing.py", "tests/datamodules/augmentation/test_recipes.py"),
    ),
    Change(  # hue is a circle
        "datamodules/augmentation/transforms.py",
        "np.mod(np.rint(np.arange(256) + 180 * turns), 180)",
        "np.clip(np.rint(np.arange(256) + 180 * turns), 0, 179)",
        ("tests/datamodules/augmentation/test_recipes.py",),
    ),
    Change(  # a factor is missing
        "datamodules/doctor/near_duplicates.py",
        ">= 64 - 2 * MAX_BITS",
        ">= 64 - MAX_BITS",
        ("tests/datamodules/doctor/test_near_duplicates.py", "tests/datamodules/doctor/test_examine.py"),
    ),
    Change(  # some for all
        "datamodules/coco/format.py",
        "groups == {category.name}",
        "category.name in groups",
        ("tests/datamodules/coco/test_format.py",),
    ),
    Change(  # the worst proposals first
        "experiments/results/evaluate.py",
        "np.argsort(-proposals.score",
        "np.argsort(proposals.score",
        ("tests/experiments/results/test_evaluate.py",),
    ),
    Change(  # images that got better come last
        "experiments/results/compare.py",
        "np.argsort(-abs(change)",
        "np.argsort(-change",
        ("tests/experiments/results/test_compare.py",),
    ),
    Change(  # n for n - 1
        "experiments/results/runs.py",
        "statistics.stdev(known)",
        "statistics.pstdev(known)",
        ("tests/experiments/report/test_document.py",),
    ),
    Change(  # the base wins over the cell
        "experiments/ablation/plan.py",
        'dict(before.get("base_options") or {}) | dict(old.get("overrides") or {})',
        'dict(old.get("overrides") or {}) | dict(before.get("base_options") or {})',
        ("tests/experiments/ablation/test_plan.py", "tests/experiments/ablation/test_ablate.py"),
    ),
    Change(  # several sizes count as several times the objects
        "experiments/anchors/audit.py",
        "count = len(best) / repeats",
        "count = len(best)",
        ("tests/experiments/anchors/test_audit.py",),
    ),
    Change(  # any for all
        "experiments/anchors/audit.py",
        "(legal == 0).all(axis=0)",
        "(legal == 0).any(axis=0)",
        ("tests/experiments/anchors/test_audit.py",),
    ),
)


def run_tests(tree: Path, tests: list[str]) -> int:
    """Pytest's exit status."""
    data = os.environ.get("FRCNN_SHARED_DATA", str(ROOT.parent / "shared" / "data"))
    environment = os.environ | {"PYTHONPATH": str(tree), "FRCNN_SHARED_DATA": data, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode


def attempt(tree: Path, change: Change) -> str:
    """What becomes of a change: "noticed", "NOT noticed", or what is wrong with it."""
    path = tree / change.file
    before = path.read_text() if path.is_file() else ""
    if before.count(change.old) != 1:
        return f"ERROR: the text is there {before.count(change.old)} times instead of once"
    path.write_text(before.replace(change.old, change.new))
    try:
        status = run_tests(tree, list(change.tests))
    finally:
        path.write_text(before)
    return {0: "NOT noticed", 1: "noticed"}.get(status, f"ERROR: the tests could not be run (pytest: {status})")


def main(numbers: list[int]) -> int:
    """Try the changes with these numbers, or all; return the exit status."""
    chosen = {number: CHANGES[number - 1] for number in numbers or range(1, len(CHANGES) + 1)}
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs")
        tree = Path(shutil.copytree(ROOT, Path(folder) / "tree", ignore=left_out))
        tests = sorted({test for change in chosen.values() for test in change.tests})
        if run_tests(tree, tests):
            print("the tests fail without any change")
            return 1
        for number, change in chosen.items():
            outcomes.append(attempt(tree, change))
            print(
                f"{number:2}. {change.file}: {change.old.strip()} -> {change.new.strip()}: {outcomes[-1]}", flush=True
            )
    noticed = outcomes.count("noticed")
    print(f"{noticed} of {len(chosen)} changes were noticed")
    return int(noticed < len(chosen) - UNNOTICED or any(outcome.startswith("ERROR") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
