"""A run's detector over HTTP: an image's bytes in, boxes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import nn

from headwater_recipes.common.serving import BadInput, check_names
from headwater_recipes.detection import tiles
from headwater_recipes.detection.model import Detector
from headwater_recipes.detection.report import SHOWN
from headwater_recipes.images.decode import Pixels
from headwater_recipes.images.serving import read_sent


class DetectionServed:
    """``common.serving.Served`` of https://huggingface.co/docs/inference-providers/tasks/object-detection."""

    task = "object-detection"

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        """See ``Served``."""
        return Detector.from_pretrained(folder).eval(), cls()

    def inputs(self, body: bytes, content_type: str) -> Pixels:
        """(H, W, 3) uint8."""
        return np.asarray(read_sent(body, content_type), dtype=np.uint8)

    def answer(self, model: nn.Module, inputs: Pixels, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``[{"label", "score", "box"}]``, surest first; ``threshold``: the least score, 0.3 if it is not said."""
        check_names(parameters, ("threshold",))
        least = parameters.get("threshold", SHOWN)
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
            raise BadInput(f"'threshold' is {json.dumps(least)[:50]}; it is a number of 0 to 1")
        assert isinstance(model, Detector)
        found = tiles.find(model, inputs, max(float(least), 1e-3))
        labels = model.settings.labels
        return [
            {
                "label": labels[label],
                "score": score,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(round, box), strict=True)),
            }
            for box, score, label in zip(
                found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            )
        ]
