"""Copies out of versions: exact bytes, whatever memory they come from and go to, however often it was used before."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from headwater.errors import UsageError
from headwater.readers import weights as weights_module
from headwater.readers.copying import Move, copy_all
from headwater.readers.windows import KEPT, Windows
from headwater.transports.memory import Sealed
from headwater.types import DenseSpec, Init, OptimizerSpec, ParameterSpec
from tests.readers.conftest import Connect, Read

SHAPE = (1200, 500)  # 2.4 MB: on both servers


def test_version_after_version(connect: Connect, read: Read, name: str) -> None:
    """Memory is used again; what was mapped for an earlier version shows this one."""
    ps, reader = connect(), read()
    w = ps.dense(name, SHAPE, optimizer=torch.optim.SGD, lr=1.0)
    into = {name: torch.zeros(SHAPE)}
    for step in range(1, 2 * KEPT):
        w.push(torch.full(SHAPE, -1.0)).wait()
        ps.publish([w], f"v{step}", keep=1 + step % 3).wait()
        with reader.lease() as weights:
            weights.copy_to(into)
            assert into[name].eq(step).all(), step
            weights.copy_to(into)
            assert into[name].eq(step).all(), step


def test_targets_of_every_kind(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    values = {
        "half": torch.randn(300, 77).bfloat16(), "whole": torch.arange(1 << 19, dtype=torch.int64),
        "one": torch.tensor(3.5), "none": torch.empty(0, 4),
    }  # fmt: skip
    parameters = tuple(
        ParameterSpec(key, tuple(value.shape), str(value.dtype).removeprefix("torch."), init=Init("values"))
        for key, value in values.items()
    )
    ps.publish([ps.table(DenseSpec(name, parameters, OptimizerSpec("Assign", ({},))), values)], "v1").wait()
    with reader.lease() as weights:
        for into in (
            {key: torch.zeros_like(value) for key, value in values.items()},
            {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in values.items()},
            {key: torch.zeros(*value.shape, 2).to(value.dtype)[..., 0] for key, value in values.items()},
        ):
            weights.copy_to(into)
            for key, value in values.items():
                assert into[key].equal(value.to(into[key].dtype)), key


def test_a_copy_is_of_what_was_published_and_autograd_hears_of_it(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    ps.publish([ps.dense(name, SHAPE)], "v1").wait()
    parameter = torch.nn.Parameter(torch.ones(SHAPE))
    with reader.lease() as weights:
        weights[name].fill_(7.0)  # a stray write: in this process alone
        loss = parameter.square().sum()
        weights.copy_to({name: parameter})
    assert parameter.eq(0).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
    with pytest.raises(UsageError, match="the lease of version 'v1' has ended"):
        weights.copy_to({name: parameter})


def test_a_version_that_is_released_while_it_is_copied_stays_mapped(
    connect: Connect, read: Read, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its holder uses the memory for the next version, and the copy is of both."""
    ps, reader = connect(), read()
    ps.publish([ps.dense(name, SHAPE)], "v1").wait()
    weights = reader.lease()
    mapped = weakref.ref(weights._tables[0].mapped)
    there: list[bool] = []

    def late(moves: Sequence[Move], threads: int) -> None:
        weights.release()
        gc.collect()
        there.append(mapped() is not None)
        copy_all(moves, threads)

    monkeypatch.setattr(weights_module, "copy_all", late)
    into = {name: torch.ones(SHAPE)}
    weights.copy_to(into)
    assert there == [True]
    assert into[name].eq(0).all()
    gc.collect()
    assert mapped() is None


def test_a_copy_is_on_the_cpu_whatever_the_default_device_is(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    ps.publish([ps.dense(name, (3,))], "v1").wait()
    with reader.lease() as weights, torch.device("meta"):
        assert weights.state_dict(copy=True)[name].tolist() == [0.0] * 3


def test_windows_are_few_and_each_shows_its_memory() -> None:
    windows, buffers = Windows(), [Sealed("version", 4096) for _ in range(KEPT + 2)]
    for turn in range(2):
        for number, buffer in enumerate(buffers):
            buffer.region.view[0] = 10 * turn + number
            fd = os.dup(buffer.fd)
            seen = windows.look((0, 1), fd, 4096)
            os.close(fd)
            assert seen[0] == 10 * turn + number
    again = windows.look((0, 1), buffers[-1].fd, 4096)
    assert again is windows.look((0, 1), buffers[-1].fd, 4096)
    assert len(windows._found[0, 1]) == KEPT
    windows.close()
    assert again[0] == 10 + KEPT + 1
    assert again is not windows.look((0, 1), buffers[-1].fd, 4096)


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the mappings that a tensor lies in which this process has found the pages of."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        word, *rest = line.split()
        if "-" in word:
            start, stop = (int(x, 16) for x in word.split("-"))
            inside = start < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < stop
        elif inside and word == "Rss:":
            found += 1024 * int(rest[0])
    return found


def test_touching_changes_nothing_and_finds_the_pages(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, SHAPE, optimizer=torch.optim.SGD, lr=1.0)
    w.push(torch.full(SHAPE, -1.0)).wait()
    ps.publish([w], "v1").wait()
    with reader.lease() as weights:
        tensor = weights[name]
        assert resident(tensor) == 0
        weights.touch()
        assert resident(tensor) >= tensor.nbytes
        assert tensor.eq(1).all()
        tensor[0, 0] = 5.0  # still in this process alone
    with read().lease() as weights:
        assert weights[name].eq(1).all()
    with pytest.raises(UsageError, match="has ended"):
        weights.touch()
