"""Module buffers: what is equal on all workers stays so; what has no mean stays here, and is watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater.client import Client
from headwater.errors import UsageError
from headwater.integrations.torch import buffers
from tests.integrations.torch.support import workers


class Bare(nn.Module):
    """One weight, and the buffers that a test gives it."""

    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (self.weight * x).sum()
        return out


def train(
    client: Client, model: Bare, steps: int, change: Callable[[int], None] | None = None, **options: Any
) -> headwater.Optimizer:
    """Steps of which each worker's gradient is its own; ``change`` writes buffers as a forward would."""
    opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, **options)
    go_on(client, model, opt, steps, change)
    return opt


def go_on(
    client: Client, model: Bare, opt: headwater.Optimizer, steps: int, change: Callable[[int], None] | None
) -> None:
    for step in range(steps):
        model(torch.tensor([1.0, client.rank, step])).backward()
        if change is not None:
            change(step)
        opt.step()
        opt.zero_grad()
        opt.synchronize()


def constants() -> dict[str, torch.Tensor]:
    return {
        "mask": torch.full((4, 4), torch.finfo(torch.float32).min).triu(1),
        "half_mask": torch.full((3, 3), torch.finfo(torch.float16).min, dtype=torch.float16),
        "infinite": torch.tensor([math.inf, -math.inf, math.nan, -0.0]),
        "hash_seeds": torch.tensor([2**62 + 12345, -(2**63), 2**63 - 1]),
        "bytes": torch.arange(256).to(torch.uint8),
        "pe": torch.sin(torch.arange(5000.0)).bfloat16(),
        "thirds": torch.arange(20_000.0) / 3,
        "expanded": torch.eye(4).expand(3, 4, 4),
        "made_in_inference": torch.inference_mode()(lambda: torch.arange(4.0) / 7)(),
        "transposed": (torch.arange(12.0) / 7).view(3, 4).t(),
        "none_at_all": torch.empty(0),
        "scalar": torch.tensor(0.1),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("mode", ["mean", "rank0", "local"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_constants_stay_to_the_bit(count: int, mode: str) -> None:
    def life(client: Client) -> None:
        model: Any = Bare(**constants())
        versions = {n: b._version for n, b in model.named_buffers() if not b.is_inference()}
        train(client, model, 2, buffers=mode).close()
        for name, buffer in model.named_buffers():
            assert bits(buffer) == bits(constants()[name]), name
            assert buffer.is_inference() or buffer._version == versions[name], "nobody wrote what did not change"

    workers(count, life, servers=2)


@pytest.mark.parametrize("count", [2, 3])
def test_step_counters_and_statistics(count: int) -> None:
    """A counter that all raise alike; an average that differs; an expanded one; one made in inference mode."""

    def life(client: Client) -> Any:
        model: Any = Bare(
            counter=torch.tensor(0), average=torch.zeros(2), wide=torch.zeros(1).expand(3), kept=torch.zeros(2)
        )
        model.register_buffer("made", torch.inference_mode()(lambda: torch.zeros(2))())

        def change(step: int) -> None:
            model.counter += 1
            model.average += client.rank
            model.wide[:1] += client.rank
            with torch.inference_mode():
                model.made += client.rank

        train(client, model, 3, change).close()
        return [model.counter.item(), *model.average.tolist(), *model.wide.tolist(), *model.made.tolist()]

    mean = 3 * sum(range(count)) / count
    assert workers(count, life) == [[3, *[mean] * 7]] * count


def test_counters_that_differ_are_rounded_down() -> None:
    def life(client: Client) -> Any:
        model: Any = Bare(counter=torch.tensor([0, 2**62]))

        def change(step: int) -> None:
            model.counter[0] += client.rank
            model.counter[1] = 2**63 - 1 - client.rank

        train(client, model, 1, change).close()
        return model.counter.tolist()

    assert workers(2, life) == [[0, 2**63 - 2]] * 2


def test_rank0_is_the_lowest_rank_that_is_there() -> None:
    """When rank 0 leaves, the buffers do not stand still."""

    def life(client: Client) -> Any:
        model: Any = Bare(average=torch.zeros(1))

        def change(step: int) -> None:
            model.average += client.rank + 1

        opt = train(client, model, 1, change, buffers="rank0")
        client.barrier("one step")
        if client.rank:
            go_on(client, model, opt, 2, change)
        opt.close()
        return model.average.tolist()

    assert workers(3, life) == [[1.0], [5.0], [5.0]]


# ---- what has no mean ----------------------------------------------------------------------------


class Named(torch.Tensor):
    """A subclass without a word of its own."""


MADE: dict[str, Callable[[], torch.Tensor]] = {
    "bool": lambda: torch.zeros(4, dtype=torch.bool),
    "complex": lambda: torch.zeros(4, dtype=torch.complex64),
    "float8": lambda: torch.zeros(4).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.zeros(4, dtype=torch.uint16),
    "uint64": lambda: torch.zeros(4, dtype=torch.uint64),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    "subclass": lambda: torch.ones(4).as_subclass(Named),
    "empty": lambda: torch.empty(0),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}
OTHER: dict[str, Callable[[], torch.Tensor]] = {
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "complex": lambda: torch.full((4,), 2j),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.zeros(4, dtype=torch.int16).view(torch.uint16) | 1,
    "uint64": lambda: torch.ones(4, dtype=torch.int64).view(torch.uint64),
    "sparse": lambda: (2 * torch.eye(4)).to_sparse(),
    "csr": lambda: (2 * torch.eye(4)).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8),
    "subclass": lambda: torch.zeros(4).as_subclass(Named),
    "empty": lambda: torch.ones(2),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|quantize|nested|prototype|deprecated).*")
@pytest.mark.parametrize("kind", MADE)
def test_without_a_mean_constants_train_and_so_does_what_changes_alike(kind: str) -> None:
    def life(client: Client) -> bool:
        model: Any = Bare(buf=MADE[kind]())
        buffer = model.buf

        def change(step: int) -> None:
            if step == 1:
                model.buf = OTHER[kind]()

        opt = train(client, model, 1)
        assert model.buf is buffer
        opt.close()
        train(client, model, 3, change, name="again").close()
        return True

    for count in (1, 2):
        assert all(workers(count, life))


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|quantize|nested|prototype|deprecated).*")
@pytest.mark.parametrize("kind", MADE)
def test_without_a_mean_what_workers_change_apart_is_named(kind: str) -> None:
    def life(client: Client) -> None:
        model: Any = Bare(buf=MADE[kind](), constant=torch.zeros(2, dtype=torch.bool))

        def change(step: int) -> None:
            if step == 1 and client.rank == 1:
                model.buf = OTHER[kind]()

        with pytest.raises(UsageError, match=r"'buf' \(.*differ between workers after step 2.*buffers='local'"):
            train(client, model, 3, change)
        assert model.weight.ne(1).any()

    workers(2, life)

    def local(client: Client) -> None:
        model: Any = Bare(buf=MADE[kind]() if client.rank else OTHER[kind]())
        train(client, model, 2, buffers="local").close()

    workers(2, local)


def test_one_worker_may_change_what_it_likes() -> None:
    def life(client: Client) -> None:
        model: Any = Bare(flag=torch.tensor(False), queue=torch.empty(0))

        def change(step: int) -> None:
            model.flag = ~model.flag
            model.queue = torch.ones(step)

        train(client, model, 3, change).close()
        assert model.flag
        assert model.queue.numel() == 2

    workers(1, life)


def test_asynchronous_workers_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(buffers, "warn", said.append)

    def life(client: Client) -> int:
        model: Any = Bare(flag=torch.tensor(False))
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, sync=headwater.Async())
        for step in range(3):
            model(torch.ones(3)).backward()
            model.flag = torch.tensor(step % 2 == 0)
            opt.step()
        opt.close()
        return sum("'flag' (bool)" in text for text in said)

    assert workers(1, life) == [0]
    address = "inproc://buffers-async"
    with headwater.connect(address, rank=0, world=2) as first, headwater.connect(address, rank=1, world=2):
        assert life(first) == 1


# ---- registered, replaced, resized, converted ----------------------------------------------------


def test_a_buffer_that_is_replaced_is_averaged_as_before() -> None:
    def life(client: Client) -> Any:
        model: Any = Bare(average=torch.zeros(2))

        def change(step: int) -> None:
            model.average = torch.full((2,), float(client.rank + step))

        train(client, model, 2, change).close()
        return model.average.tolist()

    assert workers(2, life) == [[1.5, 1.5]] * 2


def test_a_buffer_that_was_given_up_disturbs_nobody() -> None:
    def life(client: Client) -> Any:
        model: Any = Bare(average=torch.tensor([0.1, 0.3]), other=torch.zeros(1))

        def change(step: int) -> None:
            model.other += 1
            if client.rank == 1:
                model.average = None

        opt = train(client, model, 2, change)
        values = client.tables["model.buffers"].values["average"].tolist()
        opt.close()
        return [*values, model.other.item()]

    assert workers(2, life) == [[*torch.tensor([0.1, 0.3]).tolist(), 2.0]] * 2


def test_a_buffer_that_is_resized_stops_with_a_reason() -> None:
    def life(client: Client) -> None:
        model: Any = Bare(memory=torch.zeros(2))

        def change(step: int) -> None:
            if step == 1:
                model.memory = torch.zeros(3)

        with pytest.raises(UsageError, match=r"'memory' has shape \(3,\) now, and had \(2,\).*buffers='local'"):
            train(client, model, 3, change)

    workers(2, life)


@pytest.mark.parametrize("alike", [True, False])
def test_a_buffer_that_is_registered_later(alike: bool) -> None:
    def life(client: Client) -> None:
        model: Any = Bare()

        def change(step: int) -> None:
            if step == 1:
                model.register_buffer("seen", torch.tensor([0.1 if alike else float(client.rank)]))

        if alike:
            train(client, model, 3, change).close()
        else:
            with pytest.raises(UsageError, match=r"'seen' \(registered after the optimizer was made\)"):
                train(client, model, 3, change)

    workers(2, life)


def test_a_model_in_half_precision_keeps_its_buffers_there() -> None:
    """Only the buffers are converted: a parameter would leave the table."""

    def life(client: Client) -> Any:
        model: Any = Bare(average=torch.tensor([0.1, 0.2]))
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client)
        model.average = model.average.half()
        before = model.average.clone()
        model(torch.tensor([1.0, client.rank, 0.0])).backward()
        opt.step()
        opt.synchronize()
        assert torch.equal(model.average, before)
        opt.zero_grad()
        model(torch.tensor([1.0, client.rank, 0.0])).backward()
        model.average += client.rank
        opt.step()
        opt.assign()
        opt.close()
        assert model.average.dtype is torch.float16
        return model.average.tolist()

    first, second = workers(2, life)
    assert first == second
    assert first == pytest.approx([0.6, 0.7], abs=1e-3)


def test_a_buffer_that_is_a_view_of_a_parameter_follows_it() -> None:
    def life(client: Client) -> None:
        model: Any = Bare()
        model.register_buffer("part", model.weight.detach()[1:])
        model.register_buffer("whole", model.weight.detach(), persistent=False)
        opt = train(client, model, 2)
        assert torch.equal(model.part, model.weight[1:])
        assert torch.equal(model.whole, model.weight)
        assert "model.buffers" not in client.tables
        opt.close()
        with torch.no_grad():
            model.weight.fill_(7)
        assert model.part.eq(7).all()

    workers(2, life)


def test_a_buffer_over_a_parameter_and_more_is_refused() -> None:
    memory = torch.zeros(6)
    model: Any = Bare(memory=memory)
    model.weight = nn.Parameter(memory[:3])
    with pytest.raises(UsageError, match="'memory' shares memory with a parameter"):
        headwater.Optimizer(model, torch.optim.SGD, lr=0.1)


def test_views_of_each_other() -> None:
    def life(client: Client) -> Any:
        both = torch.zeros(4)
        model: Any = Bare(both=both, first=both[:2])

        def change(step: int) -> None:
            model.first += client.rank

        train(client, model, 2, change).close()
        assert torch.equal(model.both[:2], model.first)
        return model.both.tolist()

    assert workers(2, life) == [[1.0, 1.0, 0.0, 0.0]] * 2
