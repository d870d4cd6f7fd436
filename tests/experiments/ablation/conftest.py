"""A small grid."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="session")
def grid(tmp_path_factory, tiny_config) -> Path:
    """Three cells of six epochs, validated twice, the second of which fails: its weights are not there."""
    path: Path = tmp_path_factory.mktemp("grid") / "small.yaml"
    content = {
        "base": str(tiny_config),
        "axes": {
            "model.anchors.scales": [[1], [1, 2]],
            "weights": {"option": "model.backbone.weights", "values": {"none": "none", "absent": "absent.pth"}},
        },
        "seeds": [5],
        "exclude": [{"scales": [1, 2], "weights": "absent"}],
        "baseline": {"scales": 1, "weights": "none"},
        "paper": {"scales=1-2,weights=none": 0.5},
        "overrides": {"trainer.max_epochs": 6, "trainer.check_val_every_n_epoch": 3},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
