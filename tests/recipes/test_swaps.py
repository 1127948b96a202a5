"""A run is served while it trains: twenty new versions under load, and no request fails."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
from PIL import Image
from rich.console import Console

import headwater
from headwater.gateway.limits import Limits
from headwater.gateway.live import Live
from headwater.gateway.loading import FromReader
from headwater.gateway.tasks import TaskModel
from headwater_recipes.common import checkpoint, claim, job, schedule
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.trainer import Step, Trainer
from headwater_recipes.image.settings import RECIPE as IMAGE
from headwater_recipes.sentiment.settings import RECIPE as TEXT
from headwater_recipes.speech.settings import RECIPE as SOUND
from tests.gateway.http_fakes import PATIENCE, running
from tests.gateway.task_fakes import post
from tests.recipes import tiny

SWAPS = 20


def _png() -> tuple[bytes, str]:
    made = io.BytesIO()
    Image.new("L", (20, 30), 200).save(made, "png")
    return made.getvalue(), "image/png"


def _wav() -> tuple[bytes, str]:
    made = io.BytesIO()
    soundfile.write(made, 0.3 * np.sin(np.arange(4000) / 5), 16_000, format="WAV")
    return made.getvalue(), "audio/wav"


def _text() -> tuple[bytes, str]:
    return json.dumps({"inputs": "письмо хорошо"}).encode(), "application/json"


class _Clients:
    """They ask without a pause. ``seen``: steps of the versions that have answered; ``wrong``: what else came."""

    def __init__(self, server: Any, body: bytes, kind: str, count: int = 3) -> None:
        self.seen: set[int] = set()
        self.wrong: list[Any] = []
        self._came = threading.Condition()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(server, body, kind)) for _ in range(count)]

    def __enter__(self) -> _Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _ask(self, server: Any, body: bytes, kind: str) -> None:
        last = -1
        while not self._ended.is_set():
            answer = post(server, body, kind)
            step = int(answer.headers.get("x-headwater-version-step", -1))
            named = answer.headers.get("x-headwater-version") == f"step-{step}"
            with self._came:
                if answer.status != 200 or not named or step < last or not answer.said:
                    self.wrong.append(answer)
                self.seen.add(last := step)
                self._came.notify_all()

    def wait_for(self, step: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: step in self.seen or self.wrong, PATIENCE)


class _Watched(Trainer[Any]):
    """Goes on when a client has had an answer of the version just published."""

    clients: _Clients

    def _after_step(self, taken: Step) -> None:
        super()._after_step(taken)
        self._settle()
        self.clients.wait_for(self.step)


def _settings(recipe: Recipe[Any], run: Path, **changes: Any) -> None:
    settings = checkpoint.read_state(run, recipe.settings).settings
    checkpoint.begin(recipe, run, msgspec.structs.replace(settings, **changes))
    (run / schedule.NAME).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("recipe", "asked"),
    [  # twenty versions of a text's encoder are two gigabytes
        pytest.param(TEXT, _text(), id="text", marks=pytest.mark.recipes),
        pytest.param(IMAGE, _png(), id="image"),
        pytest.param(SOUND, _wav(), id="sound"),
    ],
)
def test_twenty_versions_of_a_run_under_load_fail_no_request(
    recipe: Recipe[Any], asked: tuple[bytes, str], tmp_path: Path
) -> None:
    settings = tiny.settings(recipe, tmp_path / "data", workers=1, steps=1, save_every=1000)
    run = job.prepare(recipe, settings, tmp_path / "run", Console(quiet=True))
    claim.release(run)
    address = f"inproc://swaps-{recipe.name}"
    with contextlib.redirect_stdout(io.StringIO()):
        with headwater.connect("inproc://", rank=0, world=1, servers=1) as ps:
            first = Trainer(recipe, run, ps)
            first.run()
            first.optimizer.close()
        _settings(recipe, run, steps=1 + SWAPS, publish_every=1)
        with headwater.connect(address, rank=0, world=1, servers=1) as ps:
            worker = _Watched(recipe, run, ps)
            worker._publish()
            worker._settle()
            model, answers = recipe.load_served().read(run)
            with contextlib.closing(FromReader(headwater.reader(checkpoint.TABLE, address))) as source:
                live = Live(model, source, retry=0.01)
                with (
                    running(TaskModel(live, answers), Limits(threads=2)) as server,
                    _Clients(server, *asked) as clients,
                ):
                    worker.clients = clients
                    worker.run()
            worker.optimizer.close()
    assert clients.wrong == []
    assert clients.seen >= set(range(2, 2 + SWAPS))
    assert live.statistics().swaps == SWAPS
