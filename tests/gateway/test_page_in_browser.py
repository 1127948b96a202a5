"""The page at / in a headless Chromium: what a person does with it. Skipped where there is no browser."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.predict import ModulePredictor
from headwater.gateway.sources import MemorySource
from headwater.gateway.tasks import TaskModel
from tests.gateway import browser
from tests.gateway.http_fakes import FakeEngine, running
from tests.gateway.task_fakes import Scores, Toy, serving

BROWSER = browser.find()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt install chromium-headless-shell)")

DONE = "!byId('go').disabled && (byId('version').textContent || !byId('error').hidden)"
SCORES = "high 0.665 middle 0.245 low 0.090"


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Page]:
    assert BROWSER
    with browser.browsing(BROWSER) as page:
        yield page


@pytest.fixture
def page(chromium: browser.Page) -> Iterator[browser.Page]:
    chromium.problems.clear()
    yield chromium
    assert chromium.problems == []


def visit(page: browser.Page, url: str) -> None:
    page.open(url + "/")
    page.run("window.byId = (id) => document.getElementById(id); 0")
    page.until("!byId('form').hidden")


def drop(page: browser.Page, kind: str, body: bytes) -> None:
    """As a file from the desktop."""
    page.run(
        f"""(() => {{
            const bytes = Uint8Array.from(atob('{base64.b64encode(body).decode()}'), (each) => each.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], 'dropped', {{ type: '{kind}' }}));
            const event = new DragEvent('drop', {{ dataTransfer: dropped, bubbles: true, cancelable: true }});
            byId('drop').dispatchEvent(event);
        }})()"""
    )


def fill(page: browser.Page, **fields: str) -> None:
    for name, text in fields.items():
        page.run(f"byId({json.dumps(name)}).value = {json.dumps(text)}")
    page.run("byId('go').click()")


def answered(page: browser.Page) -> str:
    page.until(DONE)
    return " ".join(page.run("byId('answer').innerText + ' ' + byId('error').innerText").split())


def test_a_sentence(page: browser.Page) -> None:
    with serving("text-classification") as (server, toy, _):
        visit(page, server.url)
        assert page.run("document.title") == "toy"
        fill(page, text="Så bra!")
        assert answered(page) == SCORES
        assert page.run("byId('version').textContent") == "answered by version step-7 (step 7)"
        assert toy.seen[-1][0] == "Så bra!".encode()
        widths = page.run("[...document.querySelectorAll('.bar')].map((each) => each.offsetWidth)")
        assert widths == sorted(widths, reverse=True)
        assert widths[0] > 2 * widths[1] > 0


def test_an_image_is_dropped_and_seen(page: browser.Page) -> None:
    made = io.BytesIO()
    Image.new("RGB", (28, 28), (255, 0, 0)).save(made, "png")
    with serving("image-classification") as (server, toy, _):
        visit(page, server.url)
        drop(page, "image/png", made.getvalue())
        assert answered(page) == SCORES
        assert toy.seen == [(made.getvalue(), "image/png")]
        pixel = "[...byId('picture').getContext('2d').getImageData(5, 5, 1, 1).data]"
        assert page.run(pixel) == [255, 0, 0, 255]


def test_a_sound_is_recorded_and_comes_as_a_wave_file(page: browser.Page, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("audio-classification") as (server, toy, _):
        monkeypatch.setattr(toy, "inputs", lambda body, kind: toy.seen.append((body, kind)))
        visit(page, server.url)
        page.run("byId('record').click()")
        page.until("byId('record').textContent.includes(' s)')")
        page.run("byId('record').click()")
        assert answered(page) == SCORES
        ((body, kind),) = toy.seen
        assert kind == "audio/wav"
        with wave.open(io.BytesIO(body)) as sound:
            assert (sound.getnchannels(), sound.getsampwidth()) == (1, 2)
            assert sound.getnframes() > 0.1 * sound.getframerate()
            assert len(body) == 44 + 2 * sound.getnframes()


def test_an_answer_is_marked_in_its_passage(page: browser.Page) -> None:
    with serving("question-answering") as (server, _toy, _):
        visit(page, server.url)
        fill(page, question="Who?", text="😀 My name is Clara, she said.")
        assert answered(page) == "Clara 0.500 😀 My name is Clara, she said."
        assert page.run("document.querySelector('mark').textContent") == "Clara"


def test_a_language_model_and_a_module_of_ones_own(page: browser.Page) -> None:
    with running(FakeEngine(context=4096, says="once upon")) as server:
        visit(page, server.url)
        fill(page, text="a")
        assert answered(page) == "once upon"
    with running(ModulePredictor(Live(torch.nn.Linear(1, 1), Still("toy")))) as server:
        page.open(server.url + "/")
        page.until("document.getElementById('task').textContent.includes('/v1/predict')")
        assert page.run("document.getElementById('form').hidden")


def test_labels_and_errors_are_text_and_never_code(page: browser.Page, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "<img src=x onerror='document.title=1'>"
    with serving("text-classification") as (server, toy, _):
        monkeypatch.setattr(toy, "answer", lambda *_: [{"label": evil, "score": 1.0}])
        visit(page, server.url)
        fill(page, text="a")
        assert answered(page) == f"{evil} 1.000"
        assert page.run("document.querySelector('img')") is None


def test_what_is_refused_is_said(chromium: browser.Page) -> None:
    with serving("image-classification") as (server, _toy, _):
        visit(chromium, server.url)
        fill(chromium)
        assert answered(chromium) == "choose an image first"
        drop(chromium, "image/png", b"no image")
        assert answered(chromium) == "this is no image that can be read; nothing was answered"
        assert chromium.run("byId('picture').hidden")


def test_a_new_version_answers_on_the_open_page(page: browser.Page) -> None:
    source = MemorySource("toy")
    with serving("text-classification", source=source) as (server, _toy, _live):
        visit(page, server.url)
        fill(page, text="a")
        assert answered(page) == SCORES
        source.publish({"weight": torch.tensor([9.0, 0.0, 0.0])}, "step-50")
        page.run("window.again = setInterval(() => byId('go').click(), 20); 0")
        page.until("byId('version').textContent.includes('step-50')")
        page.run("clearInterval(again)")
        assert answered(page).startswith("low 1.000")


def test_the_page_waits_for_the_model_and_asks_for_a_key(chromium: browser.Page, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-1\n", encoding="utf-8")
    keys.chmod(0o600)
    with running(None, keys=keys) as server:
        visit(chromium, server.url)
        assert chromium.run("byId('task').textContent") == "This server wants a key."
        fill(chromium, key="sk-1")
        chromium.until("byId('task').textContent.includes('is being loaded')")
        server.served.attach(TaskModel(Live(Scores(), Still("toy", 7)), Toy("text-classification")))
        chromium.until("!byId('text-part').hidden")
        fill(chromium, text="a")
        assert answered(chromium) == SCORES
