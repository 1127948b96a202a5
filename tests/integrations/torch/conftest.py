"""No test leaves a worker behind that the next one would find in its process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headwater.client import connecting


@pytest.fixture(autouse=True)
def _everybody_leaves() -> Iterator[None]:
    yield
    connecting.leave_all()
