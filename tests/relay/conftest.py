"""A relay's core on a stage."""

from __future__ import annotations

import pytest

from tests.relay.fake_peers import A, Stage


@pytest.fixture
def stage() -> Stage:
    """A relay that has version 1, and a reader."""
    stage = Stage()
    stage.has(1)
    stage.lists()
    stage.fetch()
    stage.join(A)
    return stage
