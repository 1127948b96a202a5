"""What plain torch gets: imported first by a program's reference run, it makes W processes one that accumulates.

Before an optimizer's step each of its gradients becomes the sum over ranks, in the order of ranks, divided by their
number; nothing else of torch is changed. A program that looks at its gradients before says so by a line
``#: mean optimizer``: there the reference takes the mean early, as DDP does. Adam, AdamW and Adagrad are torch's fused
kernels, as they are on the servers.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
_early: set[int] = set()


@functools.cache
def _group() -> Any:
    """A process group of our own: the program may make the default one."""
    store = dist.FileStore(os.environ["SCRIPTS_STORE"], WORLD)
    return dist.ProcessGroupGloo(store, RANK, WORLD)


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor of each rank, in the order of ranks."""
    mine = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    mine = mine.detach().contiguous()
    found = [torch.empty_like(mine) for _ in range(WORLD)]
    _group().allgather([found], [mine]).wait()
    return [torch.view_as_complex(each) for each in found] if tensor.is_complex() else found


def mean(optimizer: torch.optim.Optimizer) -> None:
    """Make every gradient of ``optimizer`` the mean over ranks, now; its next step does not do so again."""
    _early.add(id(optimizer))
    if WORLD == 1:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mine = parameter.grad
            counts = gather(torch.tensor([float(mine is not None)]))
            if not any(counts):
                continue
            if mine is None:
                mine = parameter.grad = torch.zeros_like(parameter)
            total, *others = gather(mine.to_dense())
            for other in others:
                total += other
            total /= WORLD
            with torch.no_grad():
                if mine.is_sparse:
                    parameter.grad = total.to_sparse(1)
                else:
                    mine.copy_(total)


def _mean_once(optimizer: torch.optim.Optimizer) -> None:
    if id(optimizer) not in _early:
        mean(optimizer)
    _early.discard(id(optimizer))


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The mean, before the step or, where a closure makes the gradients, after each evaluation."""
    closure = options.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _mean_once(optimizer)
        return None

    def evaluate() -> Any:
        loss = closure()
        _mean_once(optimizer)
        return loss

    return args[:1], {**options, "closure": evaluate}


def _fused_by_default(kind: type[torch.optim.Optimizer]) -> None:
    made = kind.__init__

    @functools.wraps(made)
    def make(self: Any, *args: Any, **options: Any) -> None:
        if type(self) is kind and not {"foreach", "fused", "capturable", "differentiable"} & options.keys():
            options["fused"] = True
        made(self, *args, **options)

    kind.__init__ = make  # type: ignore[method-assign]


for _kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
    _fused_by_default(_kind)
register_optimizer_step_pre_hook(_before_step)
