"""The examples of docs/serving.md, as they are printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.gateway.engine import Engine
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import folder
from tests.gateway.http_fakes import Running, running

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
PRINTED = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Engine(folder(positions=4096), MemorySource("toy"), slots=2)) as found:
        yield found


def examples() -> list[str]:
    """The page's blocks that ask a server."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if "headwater.reader" not in block]


def test_the_examples_run_one_after_the_other(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    found = examples()
    assert len(found) >= 2
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block.replace(PRINTED, server.url), PAGE.name, "exec"), names)
        assert capsys.readouterr().out.strip(), block
