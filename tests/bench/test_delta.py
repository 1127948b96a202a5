"""The bench of deltas, with little to encode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwater_bench import delta
from headwater_bench.options import Options
from headwater_bench.targets import TARGETS

BRIEF = Options(lambda text: None, rounds=1, size=1)


def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "PIECE", 2**18)
    monkeypatch.setattr(delta, "RACE", 2**18)
    monkeypatch.setattr(delta, "SHARES", (0.01, 0.5))
    monkeypatch.setattr(delta, "_compiling", lambda options: [])
    figures = {f.name: f for f in delta.measure(BRIEF)}
    for name in delta.KINDS:
        size = figures[f"{name} bytes per changed word"]
        assert size.ceiling is not None
        assert size.value > size.ceiling, "smaller than its entropy"
        assert figures[f"{name} words that came out wrong"].value == 0
    assert figures["bf16 AdamW 1 % changed"].value == pytest.approx(1, rel=0.3)
    assert figures["bf16 AdamW 1 % bytes per changed word"].met
    assert figures["fp32 AdamW, rate 1e-4 changed"].value > 99
    targets = {name.removeprefix("delta: ") for name in TARGETS if name.startswith("delta: ")}
    assert {f.name for f in figures.values() if f.target} == targets


def test_the_floor_is_the_entropy() -> None:
    """Every other word changed, half of those by one and half by two: two bits for the place, one for the move."""
    old = np.zeros(4096, np.uint16)
    new = old.copy()
    new[::4], new[2::4] = 1, 2
    assert delta.floor(delta.VersionPair(old.view(np.uint8), new.view(np.uint8), 2)) == pytest.approx(3 / 8)


def test_versions_of_an_optimizer() -> None:
    found = delta.stepped(torch.optim.SGD, 1.0, torch.bfloat16, torch.float32, 1000)
    assert (found.old.size, found.word) == (2000, 2)
    assert 0 < delta.changed(found).mean() <= 1


def test_where_two_lines_cross() -> None:
    low, high = delta.CodecTimes(0.1, 0.01, 1, 1), delta.CodecTimes(0.3, 0.03, 1, 1)
    assert delta.crossing([(1.0, low), (3.0, high)], 2.0) == pytest.approx(delta.CodecTimes(0.2, 0.02, 1, 1))
    assert delta.crossing([(1.0, low), (3.0, high)], 0.5) == low
    assert delta.crossing([(1.0, low), (3.0, high)], 9.0) == high
