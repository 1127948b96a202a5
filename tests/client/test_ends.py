"""A client that has closed leaves no thread that runs on while Python ends, and nothing that it has sent alive."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch

import headwater
from headwater.launch import Launcher
from tests.patience import PATIENCE


@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_nothing_that_was_sent_is_kept_and_all_threads_end_with_the_client(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", transport)
    with Launcher(1, advertise=False) as job:
        for key, value in job.environment().items():
            monkeypatch.setenv(key, value)
        before = set(threading.enumerate())
        client = headwater.connect(rank=0, world=1, timeout=PATIENCE)
        w = client.dense("w", (1 << 20,), lr=1.0)
        value = torch.ones(1 << 20)
        kept = weakref.ref(value.untyped_storage())
        gone = weakref.ref(value)
        w.assign(value)  # by the sender thread: it is large
        assert any(thread.name == "headwater-send" for thread in set(threading.enumerate()) - before)
        del value
        deadline = time.monotonic() + PATIENCE
        while gone() is not None and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert gone() is None, "the sender thread would free it, as Python ends, and abort"
        assert kept() is None
        client.close()
        assert set(threading.enumerate()) <= before
