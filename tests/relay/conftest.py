"""A relay's core on a stage."""

from __future__ import annotations

import pytest

from tests.relay.fake_upstream import A, FakeUpstream


@pytest.fixture
def stage() -> FakeUpstream:
    """A relay that has version 1, and a reader."""
    stage = FakeUpstream()
    stage.has(1)
    stage.lists()
    stage.fetch()
    stage.join(A)
    return stage
