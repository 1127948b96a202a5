"""After training: mean average precision on whole images that were never seen, beside baselines; and a picture."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from headwater_recipes.common.pictures import new_figure
from headwater_recipes.common.stages import clock, say, say_saved
from headwater_recipes.common.task import Ended
from headwater_recipes.detection import baselines, tiles
from headwater_recipes.detection.boxes import Picture, Pictures
from headwater_recipes.detection.model import Detections, Detector

PICTURE = "boxes.png"
LEAST = 0.01
"""Boxes of a lower score are in no curve of precision and recall."""
SHOWN = 0.3
"""Boxes of a lower score are not drawn, and not served by default."""
_DRAWN = 4
_SIDE = 800
"""Pixels of a held-out image that are drawn, at most."""


def figures(folder: Path, pictures: Pictures, model: Detector, ended: Ended) -> dict[str, Any]:
    """For ``report.json``; draws the picture."""
    model.eval()
    held = pictures.held_out
    found = [tiles.find(model, tiles.pixels_of(each.path), LEAST) for each in held]
    draw(folder / PICTURE, held[:_DRAWN], found, pictures.classes)
    precision = {f"validation_{name}": value for name, value in average_precision(found, held).items()}
    return {
        "validation_loss": ended.metrics["loss"],
        **precision,
        "validation_images": len(held),
        "validation_boxes": sum(len(each.boxes) for each in held),
        "baseline": {
            name: average_precision(each, held)
            for name, each in baselines.of(pictures.training, held, len(pictures.classes)).items()
        },
        "pictures": [PICTURE],
        "largest_difference_of_saved_model": ended.difference,
    }


def average_precision(found: Sequence[Detections], held: Sequence[Picture]) -> dict[str, float]:
    """COCO's mAP@[50:95] and mAP@50 (Lin and others 2014), by its own pycocotools, with up to ``tiles.MOST`` boxes of
    an image (COCO's limit of 100 would cut an image of 279 trees); over the classes that occur.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: list[tuple[int, list[float], int, dict[str, float]]] = [
        (image, box, label, {})
        for image, each in enumerate(held)
        for box, label in zip(each.corners.tolist(), each.labels, strict=True)
    ]
    told = [
        (image, box, label, {"score": score})
        for image, each in enumerate(found)
        for box, score, label in zip(each.boxes.tolist(), each.scores.tolist(), each.labels.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        both = []
        for rows in (truth, told):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": image} for image in range(len(held))],
                "categories": [{"id": label} for label in sorted({row[2] for row in (*truth, *told)})],
                "annotations": [_annotation(number, *row) for number, row in enumerate(rows, start=1)],
            }
            coco.createIndex()
            both.append(coco)
        measured = COCOeval(*both, iouType="bbox")
        measured.params.maxDets = [1, 100, tiles.MOST]
        measured.evaluate()
        measured.accumulate()
    # (thresholds, recalls, classes, areas, limits); -1 where a class does not occur. Of all areas, at the last limit.
    precision = measured.eval["precision"][:, :, :, 0, -1]
    return {"map_50_95": _mean(precision), "map_50": _mean(precision[:1])}


def _annotation(number: int, image: int, box: list[float], label: int, more: dict[str, float]) -> dict[str, Any]:
    left, top, right, bottom = box
    extent = [left, top, right - left, bottom - top]
    area = extent[2] * extent[3]
    return {"id": number, "image_id": image, "category_id": label, "bbox": extent, "area": area, "iscrowd": 0, **more}


def _mean(precision: npt.NDArray[np.float64]) -> float:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else 0.0


def draw(path: Path, held: Sequence[Picture], found: Sequence[Detections], classes: Sequence[str]) -> None:
    """Up to four images, true boxes thin and white, those that were found in the colour of their class."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    columns = min(2, len(held))
    rows = -(-len(held) // columns)
    figure = new_figure(6.5 * columns, 6.5 * rows)
    for axes, picture, told in zip(figure.subplots(rows, columns, squeeze=False).flat, held, found, strict=False):
        pixels = tiles.pixels_of(picture.path)[:_SIDE, :_SIDE]
        axes.imshow(pixels)
        axes.axis("off")
        sure = told.scores >= SHOWN
        for corners, colour, width in (
            *((each, "white", 0.8) for each in picture.corners),
            *(
                (each, colormaps["tab10"](int(label) % 10), 1.6)
                for each, label in zip(told.boxes[sure].numpy(), told.labels[sure], strict=True)
            ),
        ):
            if corners[0] < pixels.shape[1] and corners[1] < pixels.shape[0]:
                extent = corners[2:] - corners[:2]
                axes.add_patch(Rectangle(corners[:2], *extent, fill=False, edgecolor=colour, linewidth=width))
        axes.set(xlim=(0, pixels.shape[1]), ylim=(pixels.shape[0], 0))
        names = ", ".join(classes[:5])
        axes.set_title(
            f"{Path(picture.path).name}: {int(sure.sum())} found ({names}), {len(picture.boxes)} true (white)",
            fontsize=9,
        )
    figure.savefig(path, dpi=100)


def tell(folder: Path, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures."""
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; on {found['validation_images']} images "
        f"with {found['validation_boxes']:,} boxes that were never seen:",
    )
    ours = {name.removeprefix("validation_"): value for name, value in found.items()}
    for name, score in (("this model", ours), *found["baseline"].items()):
        say(
            console,
            f"  {name.replace('_', ' '):<20} mAP@50 {score['map_50']:.3f}   mAP@[50:95] {score['map_50_95']:.3f}",
        )
    say_saved(console, "Detector.from_pretrained", "boxes", found["largest_difference_of_saved_model"])
    say(
        console,
        f"{folder}: model.safetensors, config.json, metrics.jsonl, loss.png, {PICTURE}, report.json",
        whole=True,
    )
    say(console, f"serve it: headwater serve --model {folder}", whole=True)
