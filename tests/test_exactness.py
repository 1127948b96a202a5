"""Under Bulk, W workers equal one process that accumulates their gradients in rank order, bit for bit.

Every transport, 1 to 3 servers, 1 to 3 workers, with and without ``max_grad_norm``: SHA-256 of all parameters
after every step. Workers are threads here, each with a client of its own; the servers are real processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import headwater
from headwater.launch import Launcher
from headwater.types import DenseSpec, Hyper, OptimizerSpec, ParameterSpec
from headwater.wire.exact import clip_factor
from tests.patience import PATIENCE

SHAPES = {"tied": (257, 33), "bias": (7,), "scalar": (), "large": (300, 200), "last": (1023,)}
STEPS = 4
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Hyper], dict[str, object]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, {}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, {"fused": True}),
    "adamw-unfused": (torch.optim.AdamW, {"lr": 1e-3, "fused": False}, {}),
}


@pytest.fixture(scope="module", params=["local", "tcp", "inproc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[1, 2, 3])
def cluster(request: pytest.FixtureRequest, transport: str) -> Iterator[dict[str, str]]:
    """The environment of clients of a cluster with 1, 2 or 3 servers."""
    if transport == "inproc":
        yield {"HEADWATER_ADDRESS": "inproc://", "servers": str(request.param)}
        return
    with Launcher(request.param, advertise=False) as job:
        yield {**job.environment(), "HEADWATER_TRANSPORT": transport}


def gradient(rank: int, step: int, name: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.blake2b(f"{rank}/{step}/{name}".encode(), digest_size=4).digest(), "little")
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def digest(values: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(values[name].detach().numpy().tobytes() for name in SHAPES)).hexdigest()


def one_process(start: dict[str, torch.Tensor], kind: str, workers: int, max_norm: float | None) -> list[str]:
    """The reference: plain torch, micro-batches accumulated in rank order, divided, clipped, stepped."""
    cls, hyper, extra = OPTIMIZERS[kind]
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = cls(parameters.values(), **{**hyper, **extra})  # type: ignore[arg-type]
    digests = []
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradient(0, step, name)
            for rank in range(1, workers):
                parameter.grad += gradient(rank, step, name)
            parameter.grad /= workers
        if max_norm is not None:
            total = math.fsum(p.grad.double().square().sum().item() for p in parameters.values() if p.grad is not None)
            factor = clip_factor(max_norm, total)[1]
            for parameter in parameters.values():
                if factor is not None and parameter.grad is not None:
                    parameter.grad.mul_(factor)
        optimizer.step()
        digests.append(digest(dict(parameters.items())))
    return digests


def spec(kind: str, name: str, max_norm: float | None) -> DenseSpec:
    cls, hyper, _ = OPTIMIZERS[kind]
    parameters = tuple(ParameterSpec(key, shape, init=headwater.init.normal(1.0)) for key, shape in SHAPES.items())
    return DenseSpec(name, parameters, OptimizerSpec(cls.__name__, (hyper,)), headwater.Bulk(), max_norm, seed=7)


def worker(address: str, servers: int, rank: int, world: int, table_spec: DenseSpec) -> tuple[bytes, list[str]]:
    """One worker's life: what it started from, and the digest after every step."""
    with headwater.connect(address, rank=rank, world=world, timeout=PATIENCE, servers=servers) as client:
        table = client.table(table_spec)
        start = b"".join(table.values[name].numpy().tobytes() for name in SHAPES)
        client.barrier("started")  # values that are shared change with the first commit
        digests = []
        for step in range(STEPS):
            for name in SHAPES:
                table.gradients[name].copy_(gradient(rank, step, name))
            table.push(list(SHAPES)[2:])  # in two parts, as buckets would leave
            table.push(list(SHAPES)[:2])
            table.step()
            table.wait()
            digests.append(digest(table.values))
        return start, digests


def unpack(raw: bytes) -> dict[str, torch.Tensor]:
    flat = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    values, at = {}, 0
    for name, shape in SHAPES.items():
        values[name] = flat[at : at + math.prod(shape)].view(shape)
        at += math.prod(shape)
    return values


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bulk_equals_one_process(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, workers: int, request: pytest.FixtureRequest
) -> None:
    for key, value in cluster.items():
        if key.startswith("HEADWATER_"):
            monkeypatch.setenv(key, value)
    servers = int(cluster.get("servers", "1"))
    for kind in OPTIMIZERS:
        for max_norm in (None, 1.0):
            name = f"{kind}-{workers}-{max_norm}"
            address = cluster["HEADWATER_ADDRESS"]
            if address == "inproc://":
                address += f"{request.node.name}-{name}"
            with ThreadPoolExecutor(workers) as pool:
                table_spec = spec(kind, name, max_norm)
                lives = [pool.submit(worker, address, servers, r, workers, table_spec) for r in range(workers)]
                results = [life.result(PATIENCE) for life in lives]
            expected = one_process(unpack(results[0][0]), kind, workers, max_norm)
            for rank, (_, digests) in enumerate(results):
                assert digests == expected, f"{kind}, clip {max_norm}, worker {rank} of {workers}"
