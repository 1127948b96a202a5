"""A recipe's model at POST / and /models/NAME, asked as clients of the Hugging Face inference API ask."""

from __future__ import annotations

import base64
import http.client
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import pytest
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from headwater.gateway.limits import Limits
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.predict import ModulePredictor
from headwater.gateway.sources import MemorySource
from tests.gateway.http_fakes import PATIENCE, FakeEngine, Running, running
from tests.gateway.task_fakes import LABELS, PNG, WAV, Scores, Toy, post, serving

IMAGE = "image-classification"
SOUND = "audio-classification"
TEXT = "text-classification"
QUESTION = "question-answering"


@pytest.fixture(scope="module")
def image() -> Iterator[tuple[Running, Toy, Live]]:
    with serving(IMAGE) as found:
        yield found


@pytest.fixture(scope="module")
def text() -> Iterator[tuple[Running, Toy, Live]]:
    with serving(TEXT) as found:
        yield found


@pytest.fixture(scope="module")
def sound() -> Iterator[tuple[Running, Toy, Live]]:
    with serving(SOUND) as found:
        yield found


def form(**parts: bytes | tuple[str, bytes]) -> tuple[bytes, str]:
    """A multipart body: bytes are a field, a pair is a file of a content type."""
    said = b""
    for name, part in parts.items():
        said += f'--edge\r\nContent-Disposition: form-data; name="{name}"'.encode()
        kind, body = part if isinstance(part, tuple) else ("", part)
        said += f'; filename="f"\r\nContent-Type: {kind}\r\n\r\n'.encode() if kind else b"\r\n\r\n"
        said += body + b"\r\n"
    return said + b"--edge--\r\n", "multipart/form-data; boundary=edge"


# ---- the library's own client


def png() -> bytes:
    made = io.BytesIO()
    Image.new("L", (4, 4)).save(made, "png")
    return made.getvalue()


def test_the_hugging_face_client_classifies_an_image(image: tuple[Running, Toy, Live], tmp_path: Path) -> None:
    server, toy, _ = image
    (tmp_path / "a.png").write_bytes(png())
    for model in (server.url, f"{server.url}/models/toy"):
        client = InferenceClient(model=model, timeout=PATIENCE)
        for given in (str(tmp_path / "a.png"), png()):
            found = client.image_classification(given)
            assert [each.label for each in found] == ["high", "middle", "low"]
            assert toy.seen[-1][0] == png()
        found = client.image_classification(png(), top_k=1, function_to_apply="none")  # sent as JSON with base64
        assert [(each.label, each.score) for each in found] == [("high", 2.0)]
        assert toy.seen[-1] == (png(), "application/octet-stream")
    with pytest.raises(HfHubHTTPError, match="this is no image that can be read") as caught:
        client.image_classification(b"GIF89a")
    assert caught.value.response.status_code == 400


def test_the_hugging_face_client_classifies_a_sound(sound: tuple[Running, Toy, Live]) -> None:
    server, toy, _ = sound
    client = InferenceClient(model=server.url, timeout=PATIENCE)
    assert client.audio_classification(WAV)[0].label == "high"
    assert len(client.audio_classification(WAV, top_k=2)) == 2
    assert [body for body, _ in toy.seen[-2:]] == [WAV, WAV]


def test_the_hugging_face_client_classifies_a_text(text: tuple[Running, Toy, Live]) -> None:
    server, toy, _ = text
    client = InferenceClient(model=server.url, timeout=PATIENCE)
    found: Any = client.text_classification("Så bra!")
    assert [each["label"] for each in found] == ["high", "middle", "low"]
    assert toy.seen[-1] == ("Så bra!".encode(), "text/plain")
    assert len(client.text_classification("x", top_k=2)) == 2


def test_the_hugging_face_client_asks_a_question() -> None:
    with serving(QUESTION) as (server, _, _live):
        client = InferenceClient(model=server.url, timeout=PATIENCE)
        found: Any = client.question_answering(question="What's my name?", context="My name is Clara.")
        assert (found["answer"], found["start"], found["end"]) == ("Clara", 11, 16)
        with pytest.raises(HfHubHTTPError, match="'question' is missing, empty or no text"):
            client.question_answering(question="", context="My name is Clara.")


# ---- forms of a request


def test_an_answer_names_its_version_and_its_headers_are_the_servers(image: tuple[Running, Toy, Live]) -> None:
    answer = post(image[0], PNG, "image/png")
    assert answer.status == 200
    assert [each["label"] for each in answer.said] == ["high", "middle", "low"]
    assert answer.headers["x-headwater-version"] == "step-7"
    assert answer.headers["x-headwater-version-step"] == "7"
    assert "x-headwater-ignored" not in answer.headers


@pytest.mark.parametrize(
    ("body", "kind", "seen"),
    [
        (PNG, "image/png", "image/png"),
        (PNG, "Image/PNG; name=a", "image/png"),
        (PNG, "application/octet-stream", "application/octet-stream"),
        (PNG, "", "application/octet-stream"),
        ({"inputs": base64.b64encode(PNG).decode()}, None, "application/octet-stream"),
        ({"inputs": "data:image/png;base64," + base64.b64encode(PNG).decode()}, None, "image/png"),
        (*form(inputs=("image/png", PNG)), "image/png"),
        (*form(file=("application/octet-stream", PNG)), "application/octet-stream"),
        (*form(note=b"x", holiday=("image/png", PNG)), "image/png"),
    ],
)
def test_an_image_comes_through_to_the_byte(
    image: tuple[Running, Toy, Live], body: Any, kind: str | None, seen: str
) -> None:
    server, toy, _ = image
    answer = post(server, body, kind)
    assert answer.status == 200, answer.said
    assert toy.seen[-1] == (PNG, seen)


def test_a_text_comes_in_every_form(text: tuple[Running, Toy, Live]) -> None:
    server, toy, _ = text
    for body, kind in (
        ({"inputs": "bra"}, None),
        (b"bra", "text/plain; charset=utf-8"),
        form(inputs=b"bra"),
        form(file=("text/plain", b"bra")),
    ):
        answer = post(server, body, kind)  # type: ignore[arg-type]
        assert (answer.status, len(answer.said), len(answer.said[0])) == (200, 1, 3), answer.said
        assert toy.seen[-1] == (b"bra", "text/plain")


def test_several_texts_are_answered_in_their_order_by_one_version(text: tuple[Running, Toy, Live]) -> None:
    server, toy, _ = text
    answer = post(server, {"inputs": ["a", "b", "c"], "parameters": {"top_k": 1}})
    assert answer.said == [[{"label": "high", "score": pytest.approx(0.665, abs=0.001)}]] * 3
    assert [body for body, _ in toy.seen[-3:]] == [b"a", b"b", b"c"]


def test_parameters_come_in_a_form_too(image: tuple[Running, Toy, Live]) -> None:
    body, kind = form(parameters=b'{"top_k": 1, "function_to_apply": "none"}', image=("image/png", PNG))
    assert post(image[0], body, kind).said == [{"label": "high", "score": 2.0}]


def test_options_are_not_looked_at_and_unknown_fields_are_named(text: tuple[Running, Toy, Live]) -> None:
    wanted = {"inputs": "a", "options": {"wait_for_model": True}, "parameter": {"top_k": 1}}
    assert post(text[0], wanted).headers["x-headwater-ignored"] == "parameter"
    with serving(TEXT, Limits(strict=True)) as (server, _, _live):
        refused = post(server, wanted)
        assert (refused.status, "'parameter'" in refused.said["error"]) == (400, True)


# ---- what is refused


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (PNG, "audio/wav", 415, "the content type is audio/wav; for image-classification, send an image"),
        (PNG, "application/x-www-form-urlencoded", 415, "say which in content-type"),
        (PNG, "text/plain", 415, "the content type is text/plain"),
        (b"", "image/png", 400, "the body is empty"),
        (b"not an image", "image/png", 400, "no image that can be read"),
        (b"{", None, 400, "the body is not JSON"),
        (b"[]", None, 400, "Expected `object`, got `array`"),
        ({"parameters": {}}, None, 400, "'inputs' is missing"),
        ({"inputs": 5}, None, 400, "must be a file in base64"),
        ({"inputs": "????"}, None, 400, "it cannot be decoded"),
        ({"inputs": "http://example.org/a.png"}, None, 400, "an address is not fetched"),
        ({"inputs": []}, None, 400, "holds 0 things"),
        ({"inputs": "a" * 4, "parameters": 1}, None, 400, "parameters"),
        ({"inputs": base64.b64encode(PNG).decode(), "parameters": {"top_k": "a"}}, None, 400, "'top_k' is"),
        ({"inputs": base64.b64encode(PNG).decode(), "parameters": {"topk": 1}}, None, 400, "no parameter 'topk'"),
        (b"no form", "multipart/form-data; boundary=edge", 400, "not multipart/form-data"),
        (b"--edge", "multipart/form-data", 400, "not multipart/form-data"),
        (*form(parameters=b"{}"), 400, "no part 'inputs' and no file"),
        (*form(inputs=("audio/wav", WAV)), 415, "the part is audio/wav"),
        (*form(inputs=("image/png", PNG), parameters=b"{"), 400, "not JSON"),
        (b"x" * 5000, "image/png", 413, "longer than this server takes (4000 bytes)"),
    ],
)
def test_a_bad_request_is_answered_in_one_sentence(
    body: Any, kind: str | None, status: int, said: str, small: Running
) -> None:
    answer = post(small, body, kind)
    assert (answer.status, list(answer.said)) == (status, ["error"])
    assert said in answer.said["error"]
    assert answer.headers["x-headwater-version"] == "step-7"
    assert post(small, PNG, "image/png").status == 200


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with serving(IMAGE, Limits(body=4000)) as (server, _, _live):
        yield server


def test_json_that_is_too_deep_is_no_crash(text: tuple[Running, Toy, Live]) -> None:
    assert post(text[0], b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}").status == 400


def test_a_recipe_says_413_and_415_itself(sound: tuple[Running, Toy, Live], text: tuple[Running, Toy, Live]) -> None:
    assert post(sound[0], b"x" * 2000, "audio/wav").said == {
        "error": "the sound is longer than a minute; nothing was answered"
    }
    assert post(sound[0], b"x" * 2000, "audio/wav").status == 413
    assert post(text[0], {"inputs": {"text": "a"}}).status == 400
    assert post(text[0], b"\xff\xfe", "text/plain").status == 400


def test_another_name_is_not_served_here(image: tuple[Running, Toy, Live]) -> None:
    answer = post(image[0], PNG, "image/png", "/models/someone/else")
    assert (answer.status, list(answer.said)) == (404, ["error"])
    assert "'someone/else' is not served here; this server has 'toy'" in answer.said["error"]


def test_what_goes_wrong_inside_is_not_told(image: tuple[Running, Toy, Live], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(image[1], "answer", fail)
    answer = post(image[0], PNG, "image/png")
    assert (answer.status, answer.said) == (500, {"error": "the server failed on this request; its log says why"})


def test_each_kind_of_model_says_where_it_answers(image: tuple[Running, Toy, Live]) -> None:
    said = post(image[0], {"inputs": []}, path="/v1/predict").said["error"]["message"]
    assert said == "/v1/predict is not offered: 'toy' answers at /"
    assert post(image[0], {"model": "toy", "prompt": "a"}, path="/v1/completions").status == 404
    with running(ModulePredictor(Live(torch.nn.Linear(1, 1), Still("toy")))) as server:
        answer = post(server, PNG, "image/png")
        assert (answer.status, answer.said) == (404, {"error": "this is not offered: 'toy' answers at /v1/predict"})
    with running(FakeEngine()) as server:
        assert "'toy' answers at the OpenAI-compatible paths" in post(server, {"inputs": "a"}).said["error"]
    with running(None) as server:
        answer = post(server, {"inputs": "a"})
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


# ---- the page, what it asks, and keys


def get(server: Running, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urlopen(Request(server.url + path, headers=headers), timeout=PATIENCE) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_the_page_is_whole_in_itself_and_asks_this_server_alone(image: tuple[Running, Toy, Live]) -> None:
    status, headers, body = get(image[0], "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    page = body.decode()
    assert "http://" not in page
    assert "https://" not in page
    assert " src=" not in page
    assert "innerHTML" not in page  # labels and texts are a client's words


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (FakeEngine, "text-generation"),
        (lambda: ModulePredictor(Live(torch.nn.Linear(1, 1), Still("toy"))), ""),
        (lambda: None, ""),
    ],
)
def test_info_says_what_is_served(model: Any, task: str) -> None:
    made = model()
    with running(made) as server:
        said = msgspec.json.decode(get(server, "/info")[2])
        assert said == {"model": "toy", "task": task, "ready": made is not None}


def test_the_page_needs_no_key_and_the_model_does(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-1\n", encoding="utf-8")
    keys.chmod(0o600)
    with serving(IMAGE, keys=keys) as (server, _, _live):
        status, headers, _ = get(server, "/")
        assert status == 200
        assert not [name for name in headers if name.startswith("x-headwater")]
        assert get(server, "/info")[0] == 401
        refused = post(server, PNG, "image/png")
        assert (refused.status, list(refused.said)) == (401, ["error"])
        assert msgspec.json.decode(get(server, "/info", authorization="Bearer sk-1")[2])["task"] == IMAGE
        client = InferenceClient(model=server.url, token="sk-1", timeout=PATIENCE)
        assert client.image_classification(png())[0].label == "high"


def test_methods_of_a_path_with_two_are_both_named(image: tuple[Running, Toy, Live]) -> None:
    connection = http.client.HTTPConnection(*image[0].address, timeout=PATIENCE)
    connection.request("DELETE", "/")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    connection.close()


# ---- versions


def until(holds: Callable[[], bool]) -> None:
    """Nobody tells when a version has come: ask again and again."""
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if holds():
            return
        tick.wait(0.005)
    raise AssertionError("it did not come")


def test_twenty_swaps_under_load_fail_no_request() -> None:
    """Each answer is wholly of the version that its header names: version n's best score is n."""
    source = MemorySource("toy")
    with serving(IMAGE, Limits(threads=2), source) as (server, _, live):
        wanted = {"inputs": [base64.b64encode(PNG).decode()] * 2, "parameters": {"function_to_apply": "none"}}
        ended, wrong, seen = threading.Event(), list[Any](), set[int]()

        def ask() -> None:
            while not ended.is_set():
                answer = post(server, wanted)
                number = int(answer.headers["x-headwater-version-number"])
                best = [each[0]["score"] for each in answer.said] if answer.status == 200 else answer.said
                seen.add(number)
                if best != ([float(number)] * 2 if number else [2.0] * 2):
                    wrong.append((answer.status, number, best))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 21):
            source.publish({"weight": torch.tensor([float(number), 0.0, 0.0])})
            until(lambda wanted=number: wanted in seen)
        ended.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert not wrong
        assert seen >= set(range(1, 21))
        assert live.statistics().swaps == 20
        assert set(source.leases) == {20}


def test_a_version_of_another_model_is_passed_over() -> None:
    source = MemorySource("toy")
    with serving(IMAGE, source=source) as (server, _, live):
        source.publish({"weight": torch.zeros(4)})
        until(lambda: live.statistics().refused_versions > 0)
        assert live.statistics().refused_versions == 1
        assert post(server, PNG, "image/png").headers["x-headwater-version"] == "base"


def test_the_labels_are_those_of_the_toy() -> None:
    assert len(LABELS) == Scores()().numel()
