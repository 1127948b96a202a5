"""One worker of ``headwater bench step``: the same language model under three ways to synchronise.

``none``: a fused AdamW of its own, and no word to the other worker. ``headwater``: ``headwater.Optimizer`` under
``Bulk``; ``overlap``: the same with ``overlap=True``; ``clip``: with ``clip_grad_norm_`` by the script, which fetches
the mean gradient first. ``ddp``: DistributedDataParallel over Gloo and a fused AdamW of its own.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import headwater
from headwater_bench import gloo

KINDS = ("none", "headwater", "overlap", "clip", "ddp")
HYPER: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.1}


class StepTrainer:
    """The child's side. ``model`` is ``module:function`` of something that makes a ``transformers`` configuration."""

    def __init__(self, rank: int, world: int, store: str, model: str, size: str, kinds: Sequence[str] = KINDS) -> None:
        torch.set_num_threads(1)
        self._rank = rank
        gloo.join(rank, world, store)
        models = {kind: build(model, size) for kind in kinds}
        first = models[kinds[0]]
        self._parameters: int = sum(parameter.numel() for parameter in first.parameters())
        self._vocabulary: int = first.config.vocab_size
        self._steps = {kind: stepper(kind, made) for kind, made in models.items()}

    def parameters(self) -> int:
        """The model's number of parameters, tied ones once."""
        return self._parameters

    def phase(self, kind: str, steps: int, batch: int, length: int) -> float:
        """Seconds per step over ``steps`` steps of ``batch`` x ``length`` tokens, from when both workers are ready."""
        generator = torch.Generator().manual_seed(self._rank)
        tokens = torch.randint(self._vocabulary, (steps, batch, length), generator=generator)
        step, finish = self._steps[kind]
        dist.barrier()
        start = time.perf_counter()
        for one in tokens:
            step(one)
        finish()
        return (time.perf_counter() - start) / steps


def stepper(kind: str, model: Any) -> tuple[Callable[[torch.Tensor], None], Callable[[], None]]:
    """A training step of the model on a batch of tokens, and what ends a phase: until every value is fresh."""
    optimizer: Any
    finish: Callable[[], None] = _nothing
    called = model
    if kind in ("headwater", "overlap", "clip"):
        manner: dict[str, Any] = {"sync": headwater.Bulk(), "overlap": kind == "overlap"}
        optimizer = headwater.Optimizer(model, torch.optim.AdamW, **manner, **HYPER)
        finish = optimizer.synchronize
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **HYPER)
    if kind == "ddp":
        called = DistributedDataParallel(model)

    def step(tokens: torch.Tensor) -> None:
        called(input_ids=tokens, labels=tokens).loss.backward()
        if kind == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, finish


def _nothing() -> None:
    pass


def build(model: str, size: str) -> Any:
    """The model of a configuration, the same in every process."""
    from transformers import AutoModelForCausalLM  # heavy: only this bench needs it

    module, _, name = model.partition(":")
    configuration = getattr(importlib.import_module(module), name)(size)
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    return make(configuration).train()
