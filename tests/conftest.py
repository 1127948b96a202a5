"""What every test starts from: one thread for torch, and no cluster of the caller's in the environment."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)

_OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_outer_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that runs inside ``headwater run`` or with HEADWATER_* exported sees a bare environment."""
    for name in list(os.environ):
        if name.startswith("HEADWATER_") or name in _OF_A_JOB:
            monkeypatch.delenv(name)
