"""What a script has set in torch (default device and dtype, modes, threads) changes nothing in how it trains, and
Headwater changes none of it, nor draws from the script's generators.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import headwater
from tests.patience import PATIENCE

Ambient = Callable[[], AbstractContextManager[Any]]
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
KINDS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, MOMENTUM),
    (torch.optim.AdamW, {"lr": 0.1}),
    (torch.optim.Adafactor, {"lr": 0.1}),
    (torch.optim.NAdam, {"lr": 0.1}),  # not ASGD: torch's own rounds its step size to the default dtype
    (torch.optim.LBFGS, {"lr": 0.1}),  # not one of the servers'
]


@contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


AMBIENTS: dict[str, Ambient] = {
    "default device": _default_device,
    "device context": lambda: torch.device("meta"),
    "float64 by default": lambda: _default_dtype(torch.float64),
    "bfloat16 by default": lambda: _default_dtype(torch.bfloat16),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "deterministic": _deterministic,
    "threads": _threads,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def _train(kind: type[torch.optim.Optimizer], hyper: dict[str, Any], ambient: Ambient) -> list[torch.Tensor]:
    """Parameters, optimizer state and buffers after some steps; all but forward and backward inside ``ambient``."""
    model, x = _model(), torch.linspace(-1, 1, 20).reshape(5, 4)
    with ambient():
        opt = headwater.Optimizer(model, kind, client=headwater.connect("inproc://"), **hyper)

    def loss() -> torch.Tensor:
        opt.zero_grad()
        value: torch.Tensor = model(x).square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(3):
        if kind is torch.optim.LBFGS:
            opt.step(loss)
        else:
            loss()
            with ambient():
                opt.step()
    with ambient():
        opt.publish("v")
        state = opt.state_dict()
        if kind is not torch.optim.LBFGS:
            opt.load_state_dict(state)
    held = [slot for one in state["state"].values() for slot in one.values() if isinstance(slot, torch.Tensor)]
    found = [t.detach().clone() for t in [*model.parameters(), *model.buffers(), *held]]
    with ambient():
        opt.close()
    return found


@pytest.mark.parametrize(("kind", "hyper"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("ambient", AMBIENTS, ids=str)
def test_it_trains_the_same_whatever_the_script_has_set(
    kind: type[torch.optim.Optimizer], hyper: dict[str, Any], ambient: str
) -> None:
    expected = _train(kind, hyper, nullcontext)
    found = _train(kind, hyper, AMBIENTS[ambient])
    assert [t.device.type for t in found] == ["cpu"] * len(expected)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(expected, found, strict=True))


def test_an_optimizer_made_in_inference_mode_and_a_look_at_its_state_there_leave_it_trainable() -> None:
    expected = _train(torch.optim.AdamW, {"lr": 0.1}, nullcontext)
    model, x = _model(), torch.linspace(-1, 1, 20).reshape(5, 4)
    with torch.inference_mode():
        opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.1, client=headwater.connect("inproc://"))
    for step in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        with torch.inference_mode():
            opt.publish(f"v{step}")
            opt.state_dict()
            model.eval()
            model(x)
            model.train()
    values = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(expected, values, strict=False))
    opt.close()


def test_threads_with_default_devices_of_their_own_train_each_their_own_model() -> None:
    failed: list[BaseException] = []
    found: dict[int, list[torch.Tensor]] = {}

    def life(number: int) -> None:
        try:
            found[number] = _train(torch.optim.AdamW, {"lr": 0.1}, _default_device if number % 2 else nullcontext)
        except BaseException as error:  # noqa: BLE001 - raised by the test
            failed.append(error)

    threads = [threading.Thread(target=life, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    assert all(torch.equal(a, b) for number in (1, 2, 3) for a, b in zip(found[0], found[number], strict=True))


def _state() -> tuple[object, ...]:
    return (
        random.getstate(),
        *(part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()),  # noqa: NPY002
        torch.get_rng_state().numpy().tobytes(),
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        list(warnings.filters),
    )


def test_making_an_optimizer_and_all_it_does_leaves_the_script_its_generators_threads_and_flags() -> None:
    model, x = _model(), torch.linspace(-1, 1, 20).reshape(5, 4)
    before = _state()
    starts = {"*.weight": headwater.init.normal(0.1), "*.bias": headwater.init.uniform(-1, 1)}
    opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.1, client=headwater.connect("inproc://"), init=starts)
    assert _state() == before
    for _ in range(3):
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.publish("v").wait()
    opt.load_state_dict(opt.state_dict())
    opt.assign()
    opt.close()
    assert _state() == before


SCRIPT = """
import os, random, numpy, torch
import headwater
random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
def state():
    parts = numpy.random.get_state()
    return random.getstate(), parts[1].tobytes(), parts[2:], torch.get_rng_state().tolist(), torch.get_num_threads()
model = torch.nn.Linear(4, 1)
before = state()
opt = headwater.Optimizer(model, torch.optim.Adam, lr=0.1)
for _ in range(3):
    model(torch.ones(8, 4)).mean().backward(); opt.step(); opt.zero_grad()
opt.publish("v").wait(); opt.close()
assert state() == before, "training"
import headwater.data
from headwater.launch import Launcher
with Launcher(1, advertise=False) as job:
    os.environ.update(job.environment())
    with headwater.connect(rank=0, world=1) as client:
        opt = headwater.Optimizer(model, torch.optim.Adam, client=client, lr=0.1)
        model(torch.ones(8, 4)).mean().backward(); opt.step(); opt.close()
assert state() == before, "a launcher"
"""


def test_in_a_fresh_process_not_even_what_is_imported_on_the_way_draws_from_the_generators() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
