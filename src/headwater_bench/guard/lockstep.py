"""Servers and their client in one process, over real sockets, in lockstep: one thread at a time, and no time passes.

A thread that serves runs only while the client waits, and the client goes on when no server has anything left to do.
So each side makes the same calls in every run: nobody spins, no tick falls due, and no two frames arrive together that
came apart before. What is exchanged for that is the standard library's: ``select.epoll`` (servers), ``select.poll`` and
``os.sched_yield`` (the client), ``time.monotonic``. The code that is measured is not touched.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

PATIENCE = 60.0  # seconds that a server may take to come to rest
PERIOD = 0.02  # seconds: how soon a server notices that lockstep begins

_epoll, _poll, _monotonic, _sched_yield = select.epoll, select.poll, time.monotonic, os.sched_yield


class Lockstep:
    """One client and any number of servers, each a thread of this process."""

    def __init__(self) -> None:
        self._on = False
        self._frozen = 0.0
        self._driver = threading.current_thread()
        self._servers: list[_Epoll] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Servers and clients made in here can be put in step."""
        with (
            mock.patch("select.epoll", self._new_server),
            mock.patch("select.poll", partial(_Poll, self)),
            mock.patch("os.sched_yield", self._yield),
            mock.patch("time.monotonic", self._now),
            mock.patch("signal.set_wakeup_fd", _of_the_main_thread(signal.set_wakeup_fd)),
            mock.patch("signal.signal", _of_the_main_thread(signal.signal)),
        ):
            yield

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """In step, while the calling thread is the client."""
        self._driver, self._frozen, self._on = threading.current_thread(), _monotonic(), True
        for server in self._servers:
            server.await_rest()
        try:
            yield
        finally:
            self._on = False
            for server in self._servers:
                server.go.release()

    def drives(self) -> bool:
        """Whether the calling thread is the client, in step."""
        return self._on and threading.current_thread() is self._driver

    def serve(self) -> None:
        """Let the servers do all that there is to do."""
        busy = True
        while busy:
            busy = False
            for server in self._servers:
                if server.real.poll(0):
                    busy = True
                    server.go.release()
                    server.await_rest()

    @property
    def is_on(self) -> bool:
        return self._on

    def _new_server(self) -> _Epoll:
        self._servers.append(_Epoll(self))
        return self._servers[-1]

    def _yield(self) -> None:
        if self.drives():
            self.serve()
        else:
            _sched_yield()

    def _now(self) -> float:
        return self._frozen if self._on else _monotonic()


class _Epoll:
    """A server's."""

    def __init__(self, lockstep: Lockstep) -> None:
        self.real = _epoll()
        self.go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._lockstep = lockstep

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def poll(self, timeout: float = PERIOD, maxevents: int = -1) -> list[tuple[int, int]]:
        while True:
            if not self._lockstep.is_on:
                return self.real.poll(min(timeout, PERIOD), maxevents)
            events = self.real.poll(0, maxevents)
            if events:
                return events
            self._rests.release()
            self.go.acquire()

    def await_rest(self) -> None:
        """From the client: until this server has nothing to do."""
        if not self._rests.acquire(timeout=PATIENCE):
            raise TimeoutError(f"a server did not come to rest within {PATIENCE:g} s")


class _Poll:
    """The client's."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._real = _poll()
        self._lockstep = lockstep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        if not self._lockstep.drives():
            return self._real.poll(timeout)
        ready = self._real.poll(0)
        if not ready:
            self._lockstep.serve()
            ready = self._real.poll(0)
        if not ready:
            raise TimeoutError("the client waits, and no server has anything to say")
        return ready


def _of_the_main_thread(real: Any) -> Any:
    """Signals are the main thread's; a server in another one does without."""

    def call(*given: Any, **more: Any) -> Any:
        return real(*given, **more) if threading.current_thread() is threading.main_thread() else None

    return call
