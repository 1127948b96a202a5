"""Gloo: two ranks on the loopback, an all-reduce of the gradient, then the fused step in each rank.

There is no server: every rank holds the parameters and the optimizer's state, so nothing is pulled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import work

WORLD = 2


def main() -> None:
    if "PEER_RANK" in os.environ:
        run(int(os.environ["PEER_RANK"]), os.environ["PEER_STORE"])
        return
    with tempfile.TemporaryDirectory() as folder:
        common = os.environ | {"PEER_STORE": f"{folder}/gloo", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env=common | {"PEER_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(WORLD)
        ]
        codes = [rank.wait() for rank in ranks]
    sys.exit(max(codes))


def run(rank: int, store: str) -> None:
    options = work.options()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    rows = {
        "Gloo all-reduce + step": {
            "SGD": dense(torch.optim.SGD, work.SGD, work.DENSE_BYTES, options.rounds),
            "AdamW": dense(torch.optim.AdamW, work.ADAMW, work.DENSE_BYTES, options.rounds),
            "small": dense(torch.optim.SGD, work.SGD, work.SMALL_BYTES, options.small_rounds),
        }
    }
    if rank == 0:
        work.answer("Gloo", f"torch {torch.__version__}", rows)
    dist.destroy_process_group()


def dense(kind: type[torch.optim.Optimizer], hyper: dict[str, float], size: int, rounds: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(size // work.ITEM_BYTES))
    parameter.grad = torch.full_like(parameter, work.GRADIENT)
    optimizer = kind([parameter], fused=True, **hyper)

    def once() -> None:
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(WORLD)
        optimizer.step()

    found = work.timed(once, rounds)
    if kind is torch.optim.SGD:
        work.check(parameter[-1].item(), rounds + work.WARM_UP)
    return found


if __name__ == "__main__":
    main()
