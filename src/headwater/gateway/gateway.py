"""What the routes share: the model, the limits, the threads, the figures."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from headwater.gateway.gate import ClientGone
from headwater.gateway.generation import Runs, hung_up
from headwater.gateway.problems import busy, too_late

if TYPE_CHECKING:
    from starlette.requests import Request

    from headwater.gateway.limits import Limits
    from headwater.gateway.metrics import Metrics
    from headwater.gateway.served import Served

T = TypeVar("T")


class Gateway:
    """One server's state. ``document``: the OpenAPI document."""

    def __init__(self, served: Served, limits: Limits, metrics: Metrics, document: dict[str, Any]) -> None:
        self.served = served
        self.limits = limits
        self.metrics = metrics
        self.document = document
        self.runs = Runs()
        self._tokenizer = Threads(1, limits.queue + limits.choices, limits.deadline, "headwater-tokenizer")
        self._forwards = Threads(limits.threads, limits.queue, limits.deadline, "headwater-forward")

    async def tokenize(self, call: Callable[[], T]) -> T:
        """In a thread of its own, so that a long prompt stops no other client; one, as tokenizers are not all
        thread-safe."""
        return await self._tokenizer.run(call)

    async def forward(self, request: Request, call: Callable[[], T]) -> T:
        """In one of a few threads. If the client leaves before it has begun, it is not done (``ClientGone``)."""
        forward = asyncio.ensure_future(self._forwards.run(call))
        gone = asyncio.ensure_future(hung_up(request.receive))
        try:
            await asyncio.wait((forward, gone), return_when=asyncio.FIRST_COMPLETED)
            if not forward.done():
                raise ClientGone
            return await forward
        finally:
            forward.cancel()
            gone.cancel()

    def close(self) -> None:
        """End what runs, and the model. A forward of a thread is waited for: it holds a version."""
        self.served.closing = True
        self.runs.stop()
        self._tokenizer.close()
        self._forwards.close()
        self.served.close()


class Threads:
    """A pool with a bounded queue and a deadline."""

    def __init__(self, threads: int, queue: int, deadline: float, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most = threads + queue
        self._deadline = deadline
        self._pending = 0

    async def run(self, call: Callable[[], T]) -> T:
        """What ``call`` returns or raises.

        Raises ``Refusal``: 429, too many wait; 504, the deadline passed. A call that has begun then ends unheard.
        """
        if self._pending >= self._most:
            raise busy(f"{self._pending} requests run or wait, which is as many as may; nothing was done")
        self._pending += 1
        future = self._pool.submit(call)
        future.add_done_callback(functools.partial(self._leave, asyncio.get_running_loop()))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._deadline)
        except TimeoutError:
            if future.done() and not future.cancelled():
                return future.result()
            raise too_late(self._deadline, "no answer was made") from None

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _leave(self, loop: asyncio.AbstractEventLoop, _: object) -> None:
        """Called where the call ended; the count belongs to the loop's thread."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._left)

    def _left(self) -> None:
        self._pending -= 1
