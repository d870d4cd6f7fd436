from pathlib import Path

import numpy as np
import pytest

from detector.errors import InputError
from detector.metrics.error_breakdown import break_down_errors
from detector.metrics.voc_ap import Detections, GroundTruth
from experiments.results.error_plot import plot_error_breakdown


def test_plot_is_an_image_and_names_classes_without_objects(tmp_path: Path) -> None:
    errors = break_down_errors(
        Detections(np.array([0]), np.array([1]), np.array([0.9]), np.array([[0.0, 0.0, 100.0, 40.0]])),
        GroundTruth(np.array([0]), np.array([1]), np.array([[0.0, 0.0, 100.0, 100.0]]), np.array([False])),
        [1, 2],
    )  # of an IoU of 0.4
    plot_error_breakdown(errors, ["cat", "dog"], tmp_path / "new" / "errors.svg", "a title")
    text = (tmp_path / "new" / "errors.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    assert all(f"<!-- {word} -->" in text for word in ("a title", "cat (0.0)", "dog (nan)", "localisation", "100.0"))
    with pytest.raises(InputError, match=r"errors\.docx: the file must end with"):
        plot_error_breakdown(errors, ["cat", "dog"], tmp_path / "errors.docx", "a title")
