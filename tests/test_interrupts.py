"""Signal handlers that raise, at every line of ours: nothing is left half way (``headwater.interrupts``)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater import interrupts
from headwater.client import connecting
from headwater.launch import Launcher
from tests.patience import PATIENCE

OURS = str(Path(headwater.__file__).parent) + os.sep
CHOSEN = signal.SIGUSR1
OTHER = signal.SIGUSR2
ALARM = signal.SIGALRM


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that other tests have left open in this process are none of these optimizers' business."""
    monkeypatch.setattr(connecting, "_clients", weakref.WeakSet())


class Stop(BaseException):
    """What the handler raises."""


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Stop(number)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.signal(number, _raise) for number in (CHOSEN, OTHER, ALARM)}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(after.values()) == {_raise}, "the script's handlers are where they were"


def test_a_handler_waits_until_the_outermost_function_is_done_and_all_that_came_run() -> None:
    done: list[str] = []

    @interrupts.deferred
    def inner() -> None:
        signal.raise_signal(CHOSEN)
        signal.raise_signal(OTHER)
        done.append("inner")

    @interrupts.deferred
    def outer() -> None:
        inner()
        done.append("outer")

    with pytest.raises(Stop) as caught:
        outer()
    assert done == ["inner", "outer"]
    first = caught.value.__context__
    assert isinstance(first, Stop)
    assert {caught.value.args, first.args} == {(CHOSEN,), (OTHER,)}, "neither is lost"
    outer_again = interrupts.deferred(lambda: done.append("again"))
    outer_again()
    assert done[-1] == "again", "and neither comes twice"


def test_inside_a_wait_handlers_run_at_once_and_afterwards_they_wait_again() -> None:
    done: list[str] = []

    @interrupts.deferred
    def work() -> None:
        try:
            interrupts.interruptible(signal.raise_signal, CHOSEN)
        finally:
            signal.raise_signal(OTHER)
            done.append("put in order")

    with pytest.raises(Stop) as caught:
        work()
    assert done == ["put in order"]
    assert caught.value.args == (OTHER,)
    assert isinstance(caught.value.__context__, Stop)


def test_what_came_before_a_wait_is_handled_at_its_beginning() -> None:
    waited: list[int] = []

    @interrupts.deferred
    def work() -> None:
        signal.raise_signal(CHOSEN)
        interrupts.interruptible(waited.append, 1)

    with pytest.raises(Stop):
        work()
    assert waited == []


def test_handlers_that_are_set_inside_stay_and_other_threads_are_left_alone() -> None:
    def mine(_number: int, _frame: FrameType | None) -> None:
        pass

    interrupts.deferred(lambda: signal.signal(OTHER, mine))()
    assert signal.signal(OTHER, _raise) is mine
    seen: list[Any] = []
    thread = threading.Thread(target=interrupts.deferred(lambda: seen.append(signal.getsignal(CHOSEN))))
    thread.start()
    thread.join()
    assert seen == [_raise]


def test_a_child_that_a_thread_forks_meanwhile_has_its_handlers() -> None:
    status: list[int] = []

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            held = signal.getsignal(CHOSEN) is not _raise
            fine = interrupts.deferred(lambda: signal.getsignal(CHOSEN) is not _raise)()
            os._exit(int(held or not fine))
        status.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    @interrupts.deferred
    def work() -> None:
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()

    work()
    assert status == [0]


class Interrupter:
    """Sends the signal at the ``at``-th line of ours, counted from 0; ``lines``: how many there were."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.lines = 0
        self.where = ""

    def __enter__(self) -> Interrupter:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_exc: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at + 1:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(CHOSEN)
        return self._line


class Notebook:
    """One model in plain torch and through Headwater, and a cell that trains both on."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        self.plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        self.plain.load_state_dict(self.model.state_dict())
        self.opt = headwater.Optimizer(self.model, torch.optim.SGD, lr=1e-4, momentum=0.9, buffers="local", **options)
        self.reference = torch.optim.SGD(self.plain.parameters(), lr=1e-4, momentum=0.9)
        self.x = torch.randn(5, 3)

    def cell(self) -> None:
        self.model(self.x).mean().backward()  # no minimum to come to rest in
        self.opt.step()
        self.opt.zero_grad()
        self.opt.synchronize()

    def recover(self) -> None:
        self.opt.zero_grad()
        self.opt.skip_step()
        self.opt.synchronize()

    @interrupts.deferred
    def follow(self) -> int:
        """Let plain torch go on to where the model is, at most one step on; how many steps that were."""
        for steps in (0, 1):
            pairs = zip(self.model.parameters(), self.plain.parameters(), strict=True)
            if all(torch.equal(a, b) for a, b in pairs):
                return steps
            self.plain(self.x).mean().backward()  # no minimum to come to rest in
            self.reference.step()
            self.reference.zero_grad()
        raise AssertionError("the model is at no step of plain torch")


def _train_through(notebook: Notebook, first: int, stride: int) -> int:
    """Interrupt a cell at every ``stride``-th line of ours; after each one it must train on as plain torch."""
    at = first
    while True:
        interrupter = Interrupter(at)
        try:
            with interrupter:
                notebook.cell()
        except Stop:
            notebook.recover()
            notebook.follow()
        else:
            if interrupter.lines <= at:
                return at
            notebook.follow()  # it came where it was ignored: in a finaliser
        notebook.cell()
        assert notebook.follow() == 1, interrupter.where
        at += stride


def test_an_in_process_cluster_trains_on_after_an_interrupt_at_any_line() -> None:
    notebook = Notebook()
    notebook.cell()
    notebook.follow()
    assert _train_through(notebook, 0, 1) > 500
    notebook.opt.close()


@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_a_worker_of_a_cluster_trains_on_after_interrupts_at_lines_and_at_any_moment(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", transport)
    with Launcher(1, advertise=False) as job:
        for key, value in job.environment().items():
            monkeypatch.setenv(key, value)
        with headwater.connect(rank=0, world=1, timeout=PATIENCE) as client:
            notebook = Notebook(client=client)
            notebook.cell()
            notebook.follow()
            _train_through(notebook, 3, 37)
            for delay in range(100):
                try:
                    signal.setitimer(signal.ITIMER_REAL, (1 + delay % 50) * 1e-4)
                    while True:
                        notebook.cell()
                        assert notebook.follow() == 1
                except Stop:
                    notebook.recover()
                    notebook.follow()
                notebook.cell()
                assert notebook.follow() == 1
            notebook.opt.close()
