"""Images of a training on a network of timm are normalised as that was trained, and what is done is said."""

import pytest
from jsonargparse import Namespace

from experiments.run import lightning_cli

pytest.importorskip("timm", reason="timm is not installed: pip install '.[timm]'")
USUAL = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("model", "given", "mean", "said"),
    [
        ("test_convnext", USUAL, [0.5, 0.5, 0.5], "image.mean [0.5, 0.5, 0.5], image.std [0.5, 0.5, 0.5]: set as"),
        ("test_convnext", USUAL | {"mean": [0.1, 0.2, 0.3]}, [0.1, 0.2, 0.3], "warning: image.mean [0.1, 0.2, 0.3]"),
        ("test_efficientnet", USUAL, USUAL["mean"], ""),  # was trained with the usual ones
        (None, USUAL, USUAL["mean"], ""),
    ],
)
def test_mean_and_deviation_are_those_of_the_model(
    model: str | None, given: dict[str, list[float]], mean: list[float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(lightning_cli, "rank_zero_info", lines.append)
    backbone = Namespace(name="timm", model=model, norm="batch") if model else Namespace(name="resnet50_fpn")
    options = Namespace(backbone=backbone, image=Namespace(**given))
    lightning_cli._normalise_as_timm(options)
    assert options.image.mean == mean
    assert len(lines) == bool(said) and "".join(lines).startswith(said)
