"""Under another launcher: torchrun's variables say who this is, and workers that nobody brings together are told."""

from __future__ import annotations

import pytest

import headwater
from headwater.launch import Launcher


def test_in_a_cluster_that_it_was_sent_to_torchruns_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with Launcher(1, advertise=False) as launcher:
        for name, value in launcher.environment().items():
            if name.startswith(("HEADWATER_ADDRESS", "HEADWATER_TOKEN")):
                monkeypatch.setenv(name, value)
        for name in ("HEADWATER_RANK", "HEADWATER_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with headwater.connect() as client:
            assert (client.rank, client.world) == (1, 2)


def test_workers_that_would_train_apart_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADWATER_ADDRESS", "HEADWATER_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(headwater.UsageError, match=r"one of 2 .*headwater run --workers N"):
        headwater.connect()
    monkeypatch.setenv("WORLD_SIZE", "1")
    headwater.connect().close()
