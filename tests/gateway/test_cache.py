"""The key-value memory: what is stored stays, what is left is gone."""

from __future__ import annotations

import torch

from headwater.gateway.cache import KeyValues, Window


def test_views_grow_and_keep() -> None:
    past = KeyValues(layers=1, slots=4, context=300)
    stored = torch.randn(2, 3, 130, 5)
    for at in range(130):
        past.reserve(2, at + 1)
        new = stored[:, :, at : at + 1]
        keys, values = past.update(0, new, -new, Window(0, torch.tensor([[at], [at]]), at + 1))
    assert torch.equal(keys, stored)
    assert torch.equal(values, -stored)
    assert (past.rows, past.length) == (2, 256)
    past.reserve(3, 299)
    assert (past.rows, past.length) == (4, 300)
    assert past.nbytes == 4 * 300 * past.nbytes_of_position == 4 * 300 * (2 * 3 * 5 * 4)


def test_rows_write_at_their_own_positions() -> None:
    past = KeyValues(layers=1, slots=4, context=64)
    past.reserve(3, 10)
    new = torch.randn(3, 2, 1, 4)
    keys, _ = past.update(0, new, new, Window(0, torch.tensor([[9], [0], [4]]), 10))
    expected = torch.zeros(3, 2, 10, 4)
    for row, at in enumerate((9, 0, 4)):
        expected[row, :, at] = new[row, :, 0]
    assert torch.equal(keys, expected)


def test_a_chunk_goes_into_one_row() -> None:
    past = KeyValues(layers=1, slots=4, context=64)
    past.reserve(3, 10)
    new = torch.randn(1, 2, 3, 4)
    keys, _ = past.update(0, new, new, Window(2, torch.arange(5, 8)[None], 8))
    assert torch.equal(keys[:, :, 5:], new)
    assert not keys[:, :, :5].any()
    others, _ = past.update(0, new * 0, new * 0, Window(0, torch.arange(5, 8)[None], 8))
    assert not others.any()


def test_a_move_leaves_nothing_behind() -> None:
    past = KeyValues(layers=1, slots=2, context=64)
    past.reserve(2, 6)
    new = torch.randn(1, 2, 6, 4)
    past.update(0, new, new, Window(1, torch.arange(6)[None], 6))
    past.move(1, 0, 6)
    zero = torch.zeros(1, 2, 1, 4)
    first, _ = past.update(0, zero, zero, Window(0, torch.tensor([[6]]), 7))
    second, _ = past.update(0, zero, zero, Window(1, torch.tensor([[6]]), 7))
    assert torch.equal(first[:, :, :6], new)
    assert not second.any()
    past.clear(0, 6)
    assert not first.any()


def test_memory_is_given_back() -> None:
    past = KeyValues(layers=1, slots=8, context=64)
    past.reserve(8, 6)
    new = torch.randn(1, 2, 6, 4)
    past.update(0, new, new, Window(0, torch.arange(6)[None], 6))
    held = past.nbytes
    past.shrink(5)
    assert past.nbytes == held
    past.shrink(1)
    assert past.nbytes == held // 8
    zero = torch.zeros(1, 2, 1, 4)
    kept, _ = past.update(0, zero, zero, Window(0, torch.tensor([[6]]), 7))
    assert torch.equal(kept[:, :, :6], new)
    past.free()
    assert past.nbytes == 0
