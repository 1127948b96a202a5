"""No test leaves a worker behind that the next one would find in its process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from headwater.client import connecting


@pytest.fixture(autouse=True)
def _everybody_leaves() -> Iterator[None]:
    yield
    connecting.leave_all()


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    """Overlap is given up in a process that compiles, so no test may find it one because of an earlier test."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
