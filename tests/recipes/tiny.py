"""Each recipe's tiny configuration, by name: ``test_every_recipe`` tries each with it. A new recipe adds a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from tests.recipes.conftest import write_corpus
from tests.recipes.finetuning import write_chats, write_model

SHARED: dict[str, Any] = {
    "workers": 2,
    "servers": 2,
    "steps": 8,
    "warmup": 2,
    "log_every": 2,
    "save_every": 2,
    "validate_every": 4,
    "precision": "float32",
}
"""Of all recipes; a recipe's own come on top."""


def texts(place: Path) -> dict[str, Any]:
    """Reviews in a script that no encoder of the catalog knows."""
    words = ("хорошо", "плохо")
    lines = [json.dumps({"text": f"письмо {i} {words[i % 2]}", "label": f"class {i % 2}"}) for i in range(60)]
    (place / "letters.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"data": (str(place / "letters.jsonl"),), "scratch": True, "seq": 16, "batch": 4}


def pictures(place: Path, classes: int, each: int) -> str:
    """Noise, brighter from class to class."""
    draw = np.random.default_rng(0)
    for number in range(classes):
        (place / f"class{number}").mkdir()
        for i in range(each):
            pixels = draw.integers(0, 60, (24, 24)) + 180 * number // classes
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"class{number}" / f"{i}.png")
    return str(place)


def sounds(place: Path) -> dict[str, Any]:
    """Tones with noise, by four speakers."""
    draw = np.random.default_rng(0)
    for label, hertz in (("high", 2500), ("low", 400)):
        (place / label).mkdir()
        for number in range(12):
            tone = 0.3 * np.sin(2 * np.pi * hertz * np.arange(4000) / 16_000) + 0.01 * draw.normal(size=4000)
            soundfile.write(place / label / f"speaker{number % 4}_{number}.wav", tone, 16_000)
    return {"data": (str(place),), "seconds": 0.25, "width": 8, "batch": 4}


def _image(place: Path) -> dict[str, Any]:
    return {"data": (pictures(place, 2, 20),), "size": 16, "batch": 4}


def _faces(place: Path) -> dict[str, Any]:
    return {"data": (pictures(place, 12, 6),), "size": 16, "batch": 4, "each": 2}


def _lm(place: Path) -> dict[str, Any]:
    return {"data": (str(write_corpus(place / "corpus")),), "preset": "tiny", "vocabulary": 300, "seq": 16, "batch": 2}


def _finetune(place: Path) -> dict[str, Any]:
    write_chats(place / "chats.jsonl")
    data = (str(place / "chats.jsonl"),)
    return {"model": str(write_model(place / "model")), "data": data, "seq": 48, "batch": 2, "publish_every": 0}


def _detection(place: Path) -> dict[str, Any]:
    return {"data": (str(squares(place, 6)),), "tile": 32, "width": 8, "batch": 2}


def squares(place: Path, count: int, side: int = 64, each: int = 4) -> Path:
    """Bright squares, and round things in another colour, on noise; a CSV file of their boxes."""
    draw = np.random.default_rng(0)
    lines = ["image,xmin,ymin,xmax,ymax,label"]
    for number in range(count):
        pixels = draw.integers(0, 60, (side, side, 3)).astype(np.uint8)
        for at in range(each):
            row, column = divmod(at, 2)
            size = int(draw.integers(10, 16))
            x, y = (int(draw.integers(0, side // 2 - size)) + side // 2 * place_ for place_ in (column, row))
            round_ = bool(draw.integers(2))
            inside = (
                np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) < size / 2
                if round_
                else np.ones((size, size), bool)
            )
            pixels[y : y + size, x : x + size][inside] = (60, 220, 60) if round_ else (230, 80, 80)
            lines.append(f"{number}.png,{x},{y},{x + size},{y + size},{'round' if round_ else 'square'}")
        Image.fromarray(pixels).save(place / f"{number}.png")
    (place / "boxes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place / "boxes.csv"


def _translation(place: Path) -> dict[str, Any]:
    made = [f"The {kind} house is {i}.\tLa casa {said} es {i}." for i in range(30) for kind, said in _KINDS.items()]
    (place / "pairs.tsv").write_text("\n".join(["en\tes", *made]), encoding="utf-8")
    return {"data": (str(place / "pairs.tsv"),), "vocabulary": 300, "seq": 24, "batch": 4}


def _qa(place: Path) -> dict[str, Any]:
    rows = [
        {"question": "есть ли снег", "passage": f"письмо {i // 2} {('снег', 'дождь')[i % 2]}", "answer": i % 2 == 0}
        for i in range(60)
    ]
    (place / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"data": (str(place / "asked.jsonl"),), "scratch": True, "seq": 32, "batch": 4}


_KINDS = {"white": "blanca", "small": "pequeña", "old": "vieja"}


TINY: dict[str, Callable[[Path], dict[str, Any]]] = {
    "commands": sounds,
    "detection": _detection,
    "faces": _faces,
    "finetune": _finetune,
    "image": _image,
    "linear": lambda _: {"rows": 200, "features": 3, "batch": 16},
    "lm": _lm,
    "qa": _qa,
    "sentiment": texts,
    "speech": sounds,
    "translation": _translation,
}
"""From an empty folder to the settings; data are written there. Nothing is fetched, and a run takes seconds."""


def settings(recipe: Any, place: Path, **changes: Any) -> Any:
    """The settings of a tiny run; ``place`` is made."""
    place.mkdir()
    return recipe.settings.of({**SHARED, **TINY[recipe.name](place), **changes})
