"""Clusters to read from: real processes shared by a module, over unix sockets or TCP, or one in this process."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import headwater
from headwater.client import Client
from headwater.launch import Launcher
from headwater.readers import Reader
from headwater.wire import delta
from tests.patience import PATIENCE
from tests.readers.holders import Holders

Connect = Callable[[], Client]
Read = Callable[..., Reader]
_names = itertools.count()


@pytest.fixture(scope="module")
def processes() -> Iterator[Launcher]:
    """A coordinator and two servers."""
    with Launcher(2, advertise=False) as job:
        yield job


@pytest.fixture(params=["local", "tcp", "inproc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def name() -> str:
    """A table's name, and so a model's, that no other test has."""
    return f"model-{next(_names)}"


@pytest.fixture
def address(transport: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """Of a cluster of two servers, which the environment lets clients into."""
    if transport == "inproc":
        return f"inproc://{name}"
    job: Launcher = request.getfixturevalue("processes")
    for key, value in job.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HEADWATER_TRANSPORT", transport)
    return str(job.address)


@pytest.fixture
def connect(address: str) -> Iterator[Connect]:
    """A trainer; those that are still open are closed."""
    opened: list[Client] = []

    def open_one() -> Client:
        opened.append(headwater.connect(address, timeout=PATIENCE, servers=2))
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()


@pytest.fixture
def read(address: str, name: str) -> Iterator[Read]:
    """``headwater.reader`` of the test's model."""
    opened: list[Reader] = []

    def open_one(model: str = name, timeout: float = 30, share: bool = True) -> Reader:
        opened.append(headwater.reader(model, address, timeout=timeout, share=share))
        return opened[-1]

    yield open_one
    for reader in opened:
        reader.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def holders() -> Iterator[Holders]:
    delta.warm()  # else a thread does, and has files open meanwhile
    before = descriptors()
    made = Holders()
    yield made
    made.fetcher.close()
    made.links.clear()  # with what broke them, and so the frames that it came through
    made.answer = lambda frame, fetch, said: said
    del made
    if descriptors() > before:
        gc.collect()
    assert descriptors() <= before, "descriptors were kept"
