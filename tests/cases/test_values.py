"""Who reads a parameter after ``step()`` reads that step's values; what a script writes becomes the state."""

from __future__ import annotations

import copy
import hashlib
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

import headwater
from tests.cases.support import Make, both_ways, or_says, values
from tests.integrations.torch.support import workers
from tests.patience import PATIENCE

Values = dict[str, torch.Tensor]
WIDTH = 512  # wide enough that a step takes a while


def _wide() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])


def _iterate(model: nn.Module) -> Values:
    return {
        name: torch.tensor([[x.item() for x in row[:3]] for row in p[:3]])
        for name, p in model.named_parameters()
        if p.ndim == 2
    }


def _pickled(model: nn.Module) -> Values:
    buffer = io.BytesIO()
    torch.save(model, buffer)  # noqa: TID251
    found: nn.Module = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)  # noqa: TID251
    return values(found)


READINGS: dict[str, Callable[[nn.Module], Values]] = {
    "norm": lambda m: {name: p.norm() for name, p in m.named_parameters()},
    "data": lambda m: {name: p.data.clone() for name, p in m.named_parameters()},
    "detach": lambda m: {name: p.detach().clone() for name, p in m.named_parameters()},
    "numpy": lambda m: {name: torch.from_numpy(p.detach().numpy().copy()) for name, p in m.named_parameters()},
    "item": lambda m: {name: torch.tensor(p.flatten()[0].item()) for name, p in m.named_parameters()},
    "iteration": _iterate,
    "tolist": lambda m: {name: torch.tensor(p.tolist()) for name, p in m.named_parameters()},
    "state_dict": lambda m: {name: p.clone() for name, p in m.state_dict().items()},
    "deepcopy": lambda m: values(copy.deepcopy(m)),
    "pickle": _pickled,
    "safetensors": lambda m: load(save({name: p.detach() for name, p in m.named_parameters()})),
    "through C++": lambda m: {"flat": nn.utils.parameters_to_vector(m.parameters()).detach()},
    "a list of tensors": lambda m: dict(enumerate(torch._foreach_mul([p.detach() for p in m.parameters()], 2.0))),  # type: ignore[arg-type]
    "out=": lambda m: {"sum": torch.add(m[0].weight.detach(), 0, out=torch.empty(WIDTH, WIDTH))},  # type: ignore[index]
    "functional_call": lambda m: {"y": torch.func.functional_call(m, dict(m.named_parameters()), torch.ones(1, WIDTH))},
    "a submodule": lambda m: {"y": m[1].forward(torch.ones(1, WIDTH))},  # type: ignore[index,operator]
    "linear": lambda m: {"y": nn.functional.linear(torch.ones(1, WIDTH), m[2].weight)},  # type: ignore[index,arg-type]
}


@pytest.mark.parametrize("reading", READINGS)
def test_reads_right_after_a_step(reading: str) -> None:
    def life(make: Make) -> Values:
        model = _wide()
        opt = make(model, torch.optim.SGD, lr=0.5)
        found: Values = {}
        for step in range(3):
            model(torch.randn(4, WIDTH)).square().mean().backward()
            opt.step()
            opt.zero_grad()
            found |= {f"{step} {name}": v.detach().clone() for name, v in READINGS[reading](model).items()}
        return {name: value.double().sum() for name, value in found.items()}

    both_ways(life)


def test_averages_and_target_networks_of_two_workers() -> None:
    """What each worker reads right after ``step()`` is what it reads after ``synchronize()``."""

    def life(client: Any) -> list[str]:
        torch.manual_seed(0)
        model = _wide()
        twin = nn.Sequential(model[0], nn.ReLU())
        ema = AveragedModel(model)
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.5, client=client)
        wrong = []
        for step in range(4):
            model(torch.full((4, WIDTH), 1.0 + client.rank)).square().mean().backward()
            opt.step()
            opt.zero_grad()
            copied, shared = copy.deepcopy(model), twin(torch.ones(1, WIDTH))
            ema = AveragedModel(model)
            ema.update_parameters(model)
            opt.synchronize()
            for what, other in (("copy", copied), ("ema", ema.module)):
                if any(not torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True)):
                    wrong.append(f"{what} in step {step}")
            if not torch.equal(shared, twin(torch.ones(1, WIDTH))):
                wrong.append(f"the shared layer in step {step}")
        opt.close()
        return wrong

    assert workers(2, life, servers=2) == [[], []]


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "clamp_": lambda m: [p.clamp_(-0.1, 0.1) for p in m.parameters()],
    "data.clamp_": lambda m: [p.data.clamp_(-0.1, 0.1) for p in m.parameters()],
    "mul_ by 1": lambda m: [p.mul_(1.0) for p in m.parameters()],
    "copy_ of one row": lambda m: m[0].weight[1].copy_(torch.arange(4.0)),  # type: ignore[index,operator]
    "fill_ through numpy": lambda m: m[0].weight.detach().numpy().fill(0.25),  # type: ignore[index,operator]
    "re-initialisation": lambda m: nn.init.constant_(m[2].weight, 0.5),  # type: ignore[index,arg-type]
    "renorm": lambda m: m[0].weight.copy_(torch.renorm(m[0].weight, 2, 0, 0.3)),  # type: ignore[index,operator]
    "load_state_dict": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
    "data =": lambda m: [setattr(p, "data", p.data * 0.5) for p in m.parameters()],
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(torch.linspace(-1, 1, 49), m.parameters()),
}


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("when", ["before the first step", "after a step", "before a step"])
@pytest.mark.parametrize("write", WRITES)
def test_what_a_script_writes_becomes_the_state(write: str, when: str) -> None:
    def life(make: Make) -> Values:
        model = _net()
        opt = make(model, torch.optim.SGD, lr=0.1, momentum=0.9)
        for step in range(6):
            if step == 0 and when == "before the first step":
                with torch.no_grad():
                    WRITES[write](model)
            model(torch.randn(8, 4)).square().mean().backward()
            if step == 3 and when == "before a step":
                with torch.no_grad():
                    WRITES[write](model)
            opt.step()
            opt.zero_grad()
            if step == 3 and when == "after a step":
                with torch.no_grad():
                    WRITES[write](model)
        return values(model)

    both_ways(life)


def test_what_a_script_keeps_of_memory_that_its_parameter_has_left() -> None:
    """``old = p.data; p.data = other``: steps go to the other one, and what was kept can be put back."""

    def life(make: Make) -> Values:
        model = _net()
        opt = make(model, torch.optim.SGD, lr=0.1, momentum=0.9)
        found: Values = {}

        def step(name: str) -> None:
            model(torch.randn(8, 4)).square().mean().backward()
            opt.step()
            opt.zero_grad()
            found.update({f"{name} {key}": value for key, value in values(model).items()})

        step("before")
        kept = [p.data for p in model.parameters()]
        row, twin = model[0].weight.detach()[1], nn.Parameter(model[2].weight.data)
        for p in model.parameters():
            p.data = torch.full_like(p, 0.1)
        step("other")
        found |= {f"kept {i}": p.clone() for i, p in enumerate(kept)} | {"row": row.clone(), "twin": twin.detach()}
        kept[0].mul_(0.5)
        found |= {"row after": row.clone()}  # the same memory as before
        for p, old in zip(model.parameters(), kept, strict=True):
            p.data = old
        step("back")
        step("and on")
        return found

    both_ways(life)


def test_a_graph_over_memory_that_a_parameter_has_left_is_refused() -> None:
    with headwater.connect("inproc://cases-graph-kept", timeout=PATIENCE) as ps:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=ps)
        before = model[1].weight.clone()
        waiting: Any = model(torch.ones(1, 4)).sum()  # its backward needs the second weight
        model[1].weight.data = torch.ones(1, 4)
        model(torch.ones(1, 4)).sum().backward()
        with pytest.raises(headwater.ParameterModified, match="waits for its backward"):
            opt.step()
        assert not torch.equal(model[1].weight, before)
        waiting = None
        opt.step()
        assert waiting is None
        assert opt.last_step is not None


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (1,)])
def test_a_write_is_never_a_private_page_that_stands_still(ranks: tuple[int, ...]) -> None:
    """One rank's write or everybody's: all have the same values afterwards, and go on with them."""

    def life(client: Any) -> tuple[str, float, bool]:
        torch.manual_seed(0)
        model = _net()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client)
        moved = False
        for step in range(8):
            before = model[2].bias.detach().clone()
            model(torch.full((8, 4), 1.0 + client.rank)).square().mean().backward()
            opt.step()
            opt.zero_grad()
            opt.synchronize()
            moved = not torch.equal(before, model[2].bias)
            if step == 3 and client.rank in ranks:
                with torch.no_grad():
                    for p in model.parameters():
                        p.clamp_(-0.2, 0.2)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        largest = max(p.abs().max().item() for p in model.parameters())
        opt.close()
        return digest, largest, moved

    if 0 not in ranks:  # the lowest rank's write counts; one that it has not made is nobody's
        with pytest.raises(headwater.UsageError, match="worker 1 wrote into its parameters and worker 0 did not"):
            workers(2, life, servers=2)
        return
    first, second = workers(2, life, servers=2)
    assert first == second
    assert first[2], "the parameters stand still"
    assert first[1] < 0.4, "the write was lost"


def test_a_model_that_was_loaded_after_the_optimizer_was_made() -> None:
    def life(make: Make) -> Values:
        model = _net()
        saved = {k: v + 1 for k, v in model.state_dict().items()}
        opt = make(model, torch.optim.AdamW, lr=0.1)
        model.load_state_dict(saved)
        for _ in range(2):
            model(torch.ones(8, 4)).mean().backward()
            opt.step()
            opt.zero_grad()
        return values(model)

    both_ways(life)


def test_nothing_is_drawn_from_the_scripts_generators() -> None:
    def states() -> tuple[Any, ...]:
        numpys = np.random.get_state()  # noqa: NPY002 - the scripts' own
        return random.getstate(), str(numpys), torch.get_rng_state().tolist()

    with headwater.connect("inproc://cases-random-state") as ps:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        before = states()
        for kind in (torch.optim.Adam, torch.optim.LBFGS):
            opt = headwater.Optimizer(model, kind, lr=0.1, client=ps)
            for _ in range(3):

                def closure() -> torch.Tensor:
                    loss: torch.Tensor = model(torch.ones(8, 4)).mean()
                    loss.backward()
                    return loss

                opt.step(closure)
                opt.zero_grad()
            opt.load_state_dict(opt.state_dict()) if kind is torch.optim.Adam else None
            opt.close()
        assert states() == before


def test_parameters_save_as_tensors_of_their_own(tmp_path: Any) -> None:
    with headwater.connect("inproc://cases-save") as ps:
        model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
        opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.1, client=ps)
        for _ in range(2):
            model(torch.ones(2, 256)).sum().backward()
            opt.step()
            opt.zero_grad()
            save_model(model, str(tmp_path / "model.safetensors"))
            saved = load_file(tmp_path / "model.safetensors")
            assert sorted(saved) == sorted(model.state_dict())
            assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
            for part in (model[1].state_dict(), model[1], model[1].bias):
                buffer = io.BytesIO()
                torch.save(part, buffer)  # noqa: TID251
                assert buffer.tell() < 16_000, part


@pytest.mark.parametrize(
    "buffer",
    [
        torch.eye(4).expand(3, 4, 4),
        torch.empty(0),
        torch.zeros(4).to(torch.float8_e4m3fn),
        torch.zeros(4, dtype=torch.uint32),
        torch.eye(4).to_sparse(),
        torch.inference_mode()(lambda: torch.zeros(4))(),
        torch.zeros(3, dtype=torch.complex64),
        torch.tensor(True),
    ],
    ids=["expanded", "empty", "float8", "uint32", "sparse", "inference", "complex", "bool"],
)
def test_models_with_buffers_of_every_kind_train(buffer: torch.Tensor) -> None:
    """Or the one that cannot be averaged is named, with the way out."""

    def life(make: Make) -> Values:
        model = nn.Linear(4, 4)
        model.register_buffer("odd", buffer)
        opt = make(model, torch.optim.SGD, lr=0.1)
        model(torch.ones(2, 4)).sum().backward()
        opt.step()
        return values(model)

    with or_says("'odd'.*buffers="):
        both_ways(life)


@pytest.mark.parametrize("count", [2, 3])
def test_what_is_equal_on_all_workers_is_not_changed_by_averaging(count: int) -> None:
    def life(client: Any) -> list[str]:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        model.register_buffer("mask", torch.full((2, 2), torch.finfo(torch.float32).min).triu(1))
        model.register_buffer("seeds", torch.tensor([2**62 + 12345, 7]))
        model.register_buffer("table", torch.sin(torch.arange(1000.0)).bfloat16())
        model.register_buffer("tenth", torch.full((5,), 0.1))
        model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        before = {name: b.clone() for name, b in model.named_buffers()}
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client)
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            model.steps += 1  # type: ignore[operator]
            opt.step()
            opt.zero_grad()
        opt.synchronize()
        before["steps"] += 3
        changed = [name for name, b in model.named_buffers() if not torch.equal(b, before[name])]
        opt.close()
        return changed

    assert workers(count, life) == [[]] * count


def test_a_model_that_was_compiled_and_called_before() -> None:
    """Dynamo does not look for hooks that came later; the values are there anyway, without more graphs than plain."""

    def life(make: Make) -> Values:
        torch._dynamo.reset()
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
        fast = torch.compile(model, backend="aot_eager")
        fast(torch.zeros(1, 64))
        fast(torch.zeros(4, 64))
        opt = make(model, torch.optim.SGD, lr=0.5)
        ahead = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(4):
            fast(torch.randn(4, 64)).square().mean().backward()
            opt.step()
            opt.zero_grad()
            found = fast(torch.ones(4, 64)).detach()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - ahead
        return values(model) | {"y": found, "graphs": torch.tensor(graphs)}

    both_ways(life)
