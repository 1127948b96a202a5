"""Under Bulk, W workers with ``headwater.Optimizer`` equal one process with torch.optim, bit for bit at every step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import headwater
from headwater.client import Client
from headwater.wire.exact import clip_factor
from tests.integrations.torch.support import Zoo, digest, workers, zoo

STEPS = 5
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, {}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {}),
    "adam": (torch.optim.Adam, {"lr": 1e-2}, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}, {"fused": True}),
}


def groups(model: Zoo) -> list[dict[str, Any]]:
    """Two groups, not in registration order, as people write them for weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1, "lr": 0.02},
    ]


def schedule(opt: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))


def one_process(kind: str, count: int, max_norm: float | None, dtype: torch.dtype) -> list[str]:
    cls, hyper, extra = KINDS[kind]
    model = zoo(dtype)
    opt = cls(groups(model), **hyper, **extra)
    scheduler = schedule(opt)
    digests = []
    for step in range(STEPS):
        for rank in range(count):
            model.loss(rank, step).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient /= count
        if max_norm is not None:
            total = math.fsum(g.double().square().sum().item() for g in gradients)
            factor = clip_factor(max_norm, total)[1]
            for gradient in gradients:
                gradient.mul_(1.0 if factor is None else factor)
        opt.step()
        scheduler.step()
        opt.zero_grad()
        digests.append(digest(model))
    return digests


def life(client: Client, kind: str, max_norm: float | None, dtype: torch.dtype) -> list[str]:
    cls, hyper, _ = KINDS[kind]
    model = zoo(dtype)
    opt = headwater.Optimizer(
        model, cls, groups(model), client=client, max_grad_norm=max_norm, bucket_bytes=70_000, **hyper
    )
    scheduler = schedule(opt)
    digests = []
    for step in range(STEPS):
        model.loss(client.rank, step).backward()
        opt.step()
        scheduler.step()
        opt.zero_grad()
        opt.synchronize()
        digests.append(digest(model))
    opt.close()
    return digests


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical(kind: str, count: int, servers: int) -> None:
    for max_norm in (None, 0.05):
        expected = one_process(kind, count, max_norm, torch.float32)
        found = workers(count, lambda client, norm=max_norm: life(client, kind, norm, torch.float32), servers)
        assert found == [expected] * count, f"max_grad_norm={max_norm}"


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_bit_identical_in_bfloat16(kind: str) -> None:
    expected = one_process(kind, 2, None, torch.bfloat16)
    assert workers(2, lambda client: life(client, kind, None, torch.bfloat16), 2) == [expected] * 2


@pytest.mark.parametrize("under_no_sync", [True, False])
def test_accumulation_is_bit_identical(under_no_sync: bool) -> None:
    """``sometimes`` has no gradient of the first backward in one step, and one of the second."""

    def accumulating(client: Client) -> str:
        model = zoo()
        opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01, client=client, bucket_bytes=70_000)
        for step in range(3):
            with opt.no_sync() if under_no_sync else nullcontext():
                model.loss(client.rank, 2 * step).backward()
            model.loss(client.rank, 2 * step + 1).backward()
            opt.step()
            opt.zero_grad()
        opt.close()
        return digest(model)

    model = zoo()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    for step in range(3):
        sums = []
        for rank in range(2):
            model.loss(rank, 2 * step).backward()
            model.loss(rank, 2 * step + 1).backward()
            sums.append([p.grad for p in model.parameters()])
            opt.zero_grad()
        for p, first, second in zip(model.parameters(), *sums, strict=True):
            if first is not None or second is not None:
                p.grad = sum(g for g in (first, second) if g is not None) / 2  # type: ignore[assignment]
        opt.step()
        opt.zero_grad()
    assert workers(2, accumulating, 2) == [digest(model)] * 2
