"""What every test starts from: one thread for torch, no timing, and no cluster of the caller's in the environment."""

from __future__ import annotations

import ast
import os
import sys
import threading
from typing import Any

import hypothesis
import pytest
import torch

# As in the profile that hypothesis takes (its default one, or "ci" where it sees a CI machine), but nothing is timed: a
# busy machine is no reason for a test to fail.
hypothesis.settings.register_profile(
    "headwater",
    hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, *hypothesis.settings().suppress_health_check],
)
hypothesis.settings.load_profile("headwater")

torch.set_num_threads(1)

if sys.version_info < (3, 11, 8):
    # Until 3.11.8 CPython counted the depth of the tree that it builds in one place for all threads (gh-106905): of two
    # that parse at once, as workers do in numpy.load and in torch's late imports, one now and then gets a SystemError.
    _parse = ast.parse
    _parsing = threading.RLock()

    def _parse_alone(*args: Any, **options: Any) -> Any:
        with _parsing:
            return _parse(*args, **options)

    ast.parse = _parse_alone  # type: ignore[assignment]

_OF_A_JOB = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_outer_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that runs inside ``headwater run`` or with HEADWATER_* exported sees a bare environment;
    only where data sets lie is as outside.
    """
    for name in list(os.environ):
        if (name.startswith("HEADWATER_") and name != "HEADWATER_CACHE") or name in _OF_A_JOB:
            monkeypatch.delenv(name)
