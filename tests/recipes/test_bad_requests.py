"""What a run is asked that it was not made for: recipes' own models, each in the kinds of bodies that people send."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from rich.console import Console

import headwater
from headwater.errors import BadInput
from headwater_recipes.common import claim, job
from headwater_recipes.common.trainer import Trainer
from tests.recipes import tiny
from tests.recipes.test_every_recipe import RECIPES

Served = tuple[torch.nn.Module, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """A recipe's run of one step, as ``headwater serve`` reads it."""
    made: dict[str, Served] = {}

    def get(name: str) -> Served:
        if name not in made:
            recipe, place = RECIPES[name], tmp_path_factory.mktemp(name)
            settings = tiny.settings(recipe, place / "data", workers=1, steps=1)
            run = job.prepare(recipe, settings, place / "run", Console(quiet=True))
            claim.release(run)
            with (
                contextlib.redirect_stdout(io.StringIO()),
                headwater.connect("inproc://", rank=0, world=1, servers=1) as ps,
            ):
                worker = Trainer(recipe, run, ps)
                worker.run()
                worker.optimizer.close()
            made[name] = recipe.load_served().read(run)
        return made[name]

    return get


def _ask(served: Served, body: bytes, kind: str) -> Any:
    model, answers = served
    with torch.no_grad():
        return answers.answer(model, answers.inputs(body, kind), {})


def _png(width: int, height: int) -> bytes:
    made = io.BytesIO()
    Image.new("L", (width, height), 7).save(made, "png")
    return made.getvalue()


def _huge() -> bytes:
    """The header of a PNG of 20,000 × 20,000; nobody may want the rest."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _wav(samples: Any, rate: int = 16_000, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    made = io.BytesIO()
    soundfile.write(made, samples, rate, format=kind, subtype=subtype)
    return made.getvalue()


def _tone(seconds: float, rate: int = 16_000) -> Any:
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("name", ["image", "faces"])
def test_images(name: str, served: Callable[[str], Served]) -> None:
    this = served(name)
    for body, kind in ((_png(1, 1), "image/png"), (_png(1, 900), "image/png"), (_png(9, 9), "image/jpeg")):
        assert _ask(this, body, kind)  # what an image is is seen in its bytes
    for body, kind, status in (
        (_huge(), "image/png", 413),
        (_wav(_tone(0.1)), "image/png", 400),
        (_png(9, 9)[:-20], "image/png", 400),
        (b"", "image/png", 400),
        (b"a word", "text/plain", 415),
    ):
        with pytest.raises(BadInput) as caught:
            _ask(this, body, kind)
        assert caught.value.status == status, caught.value


@pytest.mark.parametrize("name", ["speech", "commands"])
def test_sounds(name: str, served: Callable[[str], Served]) -> None:
    this = served(name)
    for body in (
        _wav(np.stack([_tone(0.5, 44_100)] * 2, axis=1), 44_100),
        _wav(_tone(0.5, 8000), 8000, "PCM_U8"),
        _wav(_tone(0.001)),
        _wav(_tone(3600, 8000), 8000, "PCM_U8"),
    ):
        assert {each["label"] for each in _ask(this, body, "audio/wav")} == {"high", "low"}
    for body, kind, status in (
        (_wav(np.zeros(8000)), "audio/wav", 400),
        (_wav(np.zeros(0)), "audio/wav", 400),
        (_png(9, 9), "audio/wav", 400),
        (b"a word", "text/plain", 415),
    ):
        with pytest.raises(BadInput) as caught:
            _ask(this, body, kind)
        assert caught.value.status == status, caught.value


def test_texts(served: Callable[[str], Served]) -> None:
    this = served("sentiment")
    for text in ("很好", "🙂", "مرحبا " * 5000, "\u0000"):  # other scripts, and much of it: the beginning counts
        assert _ask(this, text.encode(), "text/plain")
    for body, kind, status in (
        (b"\xff\xfe\xfa", "text/plain", 400),
        (b"{", "application/json", 400),
        (b"", "text/plain", 400),
        (_png(9, 9), "image/png", 415),
    ):
        with pytest.raises(BadInput) as caught:
            _ask(this, body, kind)
        assert caught.value.status == status, caught.value
