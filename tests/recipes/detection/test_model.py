"""The network's points, pieces of images, and the measures of what is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headwater_recipes.detection import baselines, report, tiles
from headwater_recipes.detection import model as network
from headwater_recipes.detection.boxes import Picture
from headwater_recipes.detection.model import Detections, Detector, NetworkSettings, Told
from headwater_recipes.detection.tiles import Tile

SETTINGS = NetworkSettings(
    labels=("a", "b"), size=(20.0, 10.0), mean=(0.5,) * 3, deviation=(0.25,) * 3, tile=64, width=8
)


def _perfect(boxes: torch.Tensor, labels: torch.Tensor, height: int, width: int) -> Told:
    """What a network that knows everything would say."""
    shape = torch.Size((2, height // network.STRIDE, width // network.STRIDE))
    heat = network.heat_of(boxes, labels, shape)
    size, offset = torch.zeros(2, *shape[1:]), torch.zeros(2, *shape[1:])
    middle, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    for (x, y), each, exact in zip((middle / 4).long().tolist(), extent, middle / 4, strict=True):
        size[:, y, x] = (each / torch.tensor(SETTINGS.size)).log()
        offset[:, y, x] = exact - torch.tensor([x, y])
    return Told(torch.logit(heat.clamp(1e-6, 1 - 1e-6))[None], size[None], offset[None])


def test_what_is_said_perfectly_is_read_as_it_was_and_costs_next_to_nothing() -> None:
    boxes = torch.tensor([[3.0, 5, 20, 14], [40, 30, 63, 61], [2, 40, 13, 52]])
    labels = torch.tensor([0, 1, 0])
    told = _perfect(boxes, labels, 64, 80)
    (found,) = network.peaks(told, SETTINGS.size, 0.5, 100)
    order = found.boxes[:, 0].argsort()
    assert torch.allclose(found.boxes[order], boxes[boxes[:, 0].argsort()], atol=1e-3)
    assert found.labels[order].tolist() == labels[boxes[:, 0].argsort()].tolist()
    perfect = network.loss(told, [boxes], [labels], SETTINGS.size)
    assert perfect.item() < 0.3
    moved = network.loss(told, [boxes + 8], [labels], SETTINGS.size)
    assert moved.item() > perfect.item() + 1
    empty = network.loss(told, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)], SETTINGS.size)
    assert empty.item() > perfect.item() + 1


def test_the_loss_of_images_together_is_the_sum_of_theirs() -> None:
    torch.manual_seed(0)
    told = Told(torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8), torch.rand(2, 2, 8, 8))
    boxes, labels = (
        [torch.tensor([[3.0, 5, 20, 14]]), torch.zeros(0, 4)],
        [torch.tensor([1]), torch.zeros(0, dtype=torch.long)],
    )
    both = network.loss(told, boxes, labels, SETTINGS.size)
    for at in range(2):
        alone = network.loss(
            Told(*(each[at : at + 1] for each in told)), boxes[at : at + 1], labels[at : at + 1], SETTINGS.size
        )
        assert torch.equal(both[at : at + 1], alone)


def test_a_saved_network_is_the_same(tmp_path: Path) -> None:
    model = Detector(SETTINGS).eval()
    model.save_pretrained(tmp_path)
    again = Detector.from_pretrained(tmp_path).eval()
    pixels = torch.randint(0, 256, (1, 48, 64, 3), dtype=torch.uint8)
    ours, theirs = model(model.scale(pixels)), again(again.scale(pixels))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert ours.heat.shape == (1, 2, 12, 16)


def _picture(
    tmp_path: Path, boxes: list[tuple[float, float, float, float]], side: tuple[int, int] = (200, 150)
) -> Picture:
    pixels = np.zeros((side[1], side[0], 3), np.uint8)
    for left, top, right, bottom in boxes:
        pixels[int(top) : int(bottom), int(left) : int(right)] = (40, 200, 40)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
    Image.fromarray(pixels).save(path)
    return Picture(str(path), boxes, [0] * len(boxes), *side)


def _covers(tile: Tile) -> None:
    """Green are the boxes, and nothing else."""
    inside = np.zeros(tile.pixels.shape[:2], bool)
    for left, top, right, bottom in tile.boxes.round().astype(int):
        inside[top:bottom, left:right] = True
    green = tile.pixels[..., 1].astype(int) - tile.pixels[..., 0] > 60
    assert (green == inside).mean() > 0.98
    assert len(tile.boxes)


def test_boxes_go_with_their_pixels_however_a_piece_is_cut_and_turned(tmp_path: Path) -> None:
    picture = _picture(tmp_path, [(10, 20, 60, 50), (120, 90, 150, 140), (70, 60, 90, 75)])
    _covers(tiles.cut(picture, -10, -10, 160))
    for seed in range(12):
        random = np.random.default_rng(seed)
        _covers(tiles.turned(tiles.resized(tiles.cut(picture, 0, 0, 150), 96), random))
    lost = tiles.cut(picture, 40, 0, 64)  # less than half of the first box is left, and all of none other
    assert len(lost.boxes) == int((60 - 40) / 50 >= 0.4)


def test_pieces_cover_an_image_and_nothing_is_found_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that says a box wherever it sees one green pixel's corner: the same as in one piece."""
    model = Detector(SETTINGS).eval()
    middles = [(x, y) for x in range(14, 640, 40) for y in range(14, 480, 40)]

    def told(model: Detector, scaled: torch.Tensor) -> Told:
        del model
        heat = torch.where(scaled[:, 1, 2::4, 2::4] > 1, 4.0, -9.0)
        zero = torch.zeros(len(scaled), 2, *heat.shape[1:])
        return Told(torch.stack([heat, torch.full_like(heat, -9)], 1), zero, zero)

    monkeypatch.setattr(Detector, "__call__", told)
    pixels = np.zeros((480, 640, 3), np.uint8)
    for x, y in middles:
        pixels[y, x] = 255
    found = tiles.find(model, pixels, 0.5)
    places = ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2).round().int().tolist()
    assert len(places) == len(middles)
    assert len({tuple(place) for place in places}) == len(middles)
    assert len(tiles.find(model, np.zeros((1, 1, 3), np.uint8), 0.5).boxes) == 0


def test_average_precision_is_coco_s(tmp_path: Path) -> None:
    boxes = [(float(x), 10.0, x + 8.0, 20.0) for x in range(0, 1600, 10)]  # more than COCO's limit of 100
    held = [_picture(tmp_path, boxes, (1700, 40))]
    corners = torch.from_numpy(held[0].corners)
    labels = torch.zeros(len(corners), dtype=torch.long)
    scores = torch.linspace(1, 0.5, len(corners))
    assert report.average_precision([Detections(corners, scores, labels)], held) == {"map_50_95": 1.0, "map_50": 1.0}
    half = report.average_precision([Detections(corners[:80], scores[:80], labels[:80])], held)
    assert half["map_50"] == pytest.approx(0.5, abs=0.01)
    moved = report.average_precision(
        [Detections(corners + torch.tensor([2.0, 0, 2, 0]), scores, labels)], held
    )  # IoU 0.6
    assert moved["map_50"] == pytest.approx(1.0)
    assert moved["map_50_95"] == pytest.approx(0.3)
    assert report.average_precision([Detections(corners[:0], scores[:0], labels[:0])], held) == {
        "map_50_95": 0.0,
        "map_50": 0.0,
    }


def test_green_blobs_are_found_and_a_grid_covers_the_image(tmp_path: Path) -> None:
    held = [_picture(tmp_path, [(20, 20, 50, 50), (120, 90, 150, 120)])]
    found = baselines.of(held, held, 1)
    assert report.average_precision(found["green_blobs"], held)["map_50"] > 0.6
    assert len(found["mean_boxes"][0].boxes) == (200 // 30 + (200 % 30 > 15)) * (150 // 30)


def test_images_stay_in_memory_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [_picture(tmp_path, [(1, 1, 9, 9)], (40, 30)).path for _ in range(4)]
    monkeypatch.setattr(tiles, "_HELD", 2 * 40 * 30 * 3)
    tiles._held.clear()
    first = tiles.pixels_of(paths[0])
    assert tiles.pixels_of(paths[0]) is first
    for path in paths[1:]:
        tiles.pixels_of(path)
    assert list(tiles._held) == paths[2:]
