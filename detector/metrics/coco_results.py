"""Detections in COCO's format of results: a list of dicts that JSON can hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def coco_results(
    results: Mapping[str, np.ndarray],
    file_names: Sequence[str],
    class_names: Sequence[str],
    image_ids: Sequence[int | str] | None = None,
    category_ids: Sequence[int | str] | None = None,
) -> list[dict[str, Any]]:
    """Return COCO results: `image_id`, `file_name`, `category_id`, `category_name`, `bbox` (xywh) and `score`.

    Args:
        results: Arrays `image_id` (D,), `label` (D,), `score` (D,), `box` (D, 4) xyxy, as `DetectionAP.results` gives
            them.
        file_names: By image id.
        class_names: Of classes 1..C.
        image_ids: What to write as `image_id`, by image id; default: the same.
        category_ids: What to write as `category_id`, of classes 1..C; default: 1..C.
    """
    rows = zip(
        results["image_id"].tolist(),
        results["label"].tolist(),
        results["score"].tolist(),
        results["box"].reshape(-1, 4).tolist(),
        strict=True,
    )
    return [
        {
            "image_id": image if image_ids is None else image_ids[image],
            "file_name": file_names[image],
            "category_id": label if category_ids is None else category_ids[label - 1],
            "category_name": class_names[label - 1],
            "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 6),
        }
        for image, label, score, (x1, y1, x2, y2) in rows
    ]
