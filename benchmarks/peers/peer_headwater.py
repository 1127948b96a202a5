"""Headwater: one dense table under ``Bulk`` on two servers, by the public names only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import work

import headwater
from headwater.launch import Launcher

SERVERS = 2


def main() -> None:
    options = work.options()
    rows: dict[str, dict[str, list[float]]] = {}
    with connected({}) as client:
        rows["Headwater, own buffers"] = measure(client, "own", options.rounds, options.small_rounds, in_place)
        rows["Headwater, copied in and out"] = measure(client, "out", options.rounds, options.small_rounds, copied)
    with connected({"HEADWATER_TRANSPORT": "tcp"}) as client:
        rows["Headwater, tcp"] = measure(client, "tcp", options.rounds, options.small_rounds, in_place)
    work.answer("Headwater", f"headwater {headwater.__version__}", rows)


@contextlib.contextmanager
def connected(environment: dict[str, str]) -> Iterator[headwater.Client]:
    """The one worker of a new cluster."""
    with Launcher(SERVERS, advertise=False) as launcher:
        os.environ.pop("HEADWATER_TRANSPORT", None)
        os.environ.update(launcher.environment() | environment)
        with headwater.connect(rank=0, world=1) as client:
            yield client


def in_place(table: headwater.Dense, size: int) -> Callable[[], torch.Tensor]:
    table.gradient.fill_(work.GRADIENT)

    def once() -> torch.Tensor:
        table.push(table.gradient)
        return table.pull(out=table.values)

    return once


def copied(table: headwater.Dense, size: int) -> Callable[[], torch.Tensor]:
    gradient = torch.full((size // work.ITEM_BYTES,), work.GRADIENT)
    values = torch.empty_like(gradient)

    def once() -> torch.Tensor:
        table.push(gradient)
        return table.pull(out=values)

    return once


def measure(
    client: headwater.Client,
    name: str,
    rounds: int,
    small_rounds: int,
    way: Callable[[headwater.Dense, int], Callable[[], torch.Tensor]],
) -> dict[str, list[float]]:
    """Seconds of each work, the gradient and the values going the given way."""

    def timed(kind: type[torch.optim.Optimizer], hyper: dict[str, float], size: int, times: int) -> list[float]:
        shape = (size // work.ITEM_BYTES,)
        label = f"{name}-{kind.__name__}-{size}"
        table = client.dense(label, shape, optimizer=kind, sync=headwater.Bulk(), **hyper)
        once = way(table, size)
        found = work.timed(once, times)
        if kind is torch.optim.SGD:
            work.check(once()[0].item(), len(found) + work.WARM_UP + 1)
        return found

    return {
        "SGD": timed(torch.optim.SGD, work.SGD, work.DENSE_BYTES, rounds),
        "AdamW": timed(torch.optim.AdamW, work.ADAMW, work.DENSE_BYTES, rounds),
        "small": timed(torch.optim.SGD, work.SGD, work.SMALL_BYTES, small_rounds),
    }


if __name__ == "__main__":
    main()
