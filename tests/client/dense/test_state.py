"""Values and optimizer state there and back; reads that are whole; memory that others cannot spoil."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch

import headwater
from headwater.client import Client, Dense, DenseTable
from headwater.errors import LinkBroken, ProtocolError
from headwater.launch import Launcher
from headwater.layout.dense import BLOCK
from headwater.transports import receiver
from headwater.transports.channel import SocketChannel
from headwater.types import Async, Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec, Stale, Sync
from headwater.wire import frames
from headwater.wire.frames import Kind
from tests.client.conftest import Connect
from tests.patience import PATIENCE

BLOCKS = 5 << 20  # elements: several blocks on each of two servers


def spec(name: str, optimizer: str = "AdamW", sync: Sync | None = None, **hyper: object) -> DenseSpec:
    parameters = (
        ParameterSpec("large", (500, 300), init=headwater.init.normal(1.0)),
        ParameterSpec("half", (1000, 3), "bfloat16", init=headwater.init.normal(1.0)),
        ParameterSpec("scalar", (), init=headwater.init.ones()),
        ParameterSpec("empty", (0, 4)),
        ParameterSpec("row", (17,), init=headwater.init.uniform(-1, 1)),
    )
    groups = ({"lr": 0.01, **hyper},)
    return DenseSpec(name, parameters, OptimizerSpec(optimizer, groups), sync or Bulk(), seed=3)  # type: ignore[arg-type]


def train(table: DenseTable, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gradient in table.gradients.values():
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    table.push(list(table.gradients))
    table.step().wait()
    table.wait()


def copy(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in values.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


@pytest.mark.parametrize("sync", [Bulk(), Async(), Stale(1)])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_a_copy_of_values_and_state_goes_on_as_the_original(
    connect: Connect, name: str, sync: Sync, optimizer: str
) -> None:
    client = connect(rank=0, world=1)
    original = client.table(spec(name, optimizer, sync))
    for seed in range(3):
        train(original, seed)
    twin = client.table(msgspec.structs.replace(spec(f"{name}-twin", optimizer, sync), seed=99))
    assert not same(original.values, twin.values)
    twin.assign(copy(original.values))
    assert same(original.values, twin.values)
    slots = original.slots()
    twin.assign_slots(slots)
    found = twin.slots()
    assert {p: set(s) for p, s in found.items()} == {p: set(s) for p, s in slots.items()}
    assert all(same(found[p], slots[p]) for p in slots)
    if optimizer == "AdamW":
        assert slots["large"]["exp_avg"].shape == (500, 300)
        assert slots["large"]["step"].item() == 3.0
    for seed in range(3, 5):
        train(original, seed)
        train(twin, seed)
        assert same(original.values, twin.values)


def test_assigning_one_parameter_leaves_the_others(connect: Connect, name: str) -> None:
    client = connect(rank=0, world=1)
    table = client.table(spec(name))
    before = copy(table.values)
    table.assign({"row": torch.arange(17.0), "scalar": torch.tensor(5.0)})
    assert table.values["row"].tolist() == list(range(17))
    assert table.values["scalar"].item() == 5.0
    assert table.values["large"].equal(before["large"])
    assert table.values["half"].equal(before["half"])


def test_other_workers_see_the_values_that_the_lowest_rank_gave(connect: Connect, name: str) -> None:
    given = msgspec.structs.replace(
        spec(name), parameters=(ParameterSpec("w", (300, 300), init=Init("values")),)
    )  # fmt: skip
    clients = [connect(rank=rank, world=2) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(client.table, given, {"w": torch.full((300, 300), float(rank))})
            for rank, client in reversed(list(enumerate(clients)))
        ]
        assert all(future.result(PATIENCE).values["w"].eq(0).all() for future in made)


@pytest.mark.parametrize("sync", [Async(), Stale(3), Async(4)])
def test_a_block_that_is_read_while_it_is_written_is_never_torn(connect: Connect, name: str, sync: Sync) -> None:
    """Every element of a table is the same after each step; a block with two values was torn."""
    rounds = 12
    writer, reader = connect(rank=0, world=1), connect(role="reader")
    w = writer.dense(name, (BLOCKS,), lr=1.0, sync=sync)
    r = reader.dense(name, (BLOCKS,), lr=1.0, sync=sync)
    done = threading.Event()

    def write() -> None:
        gradient = torch.ones(BLOCKS)
        try:
            for _ in range(rounds):
                w.push(gradient).wait()
        finally:
            done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        last = 0.0
        for _ in range(40):
            last = check_whole(r, last)
            if done.is_set():
                break
        writing.result(PATIENCE)
    assert r.pull().eq(-rounds).all()


def check_whole(r: Dense, last: float) -> float:
    """On streams a block of the layout is whole; shared memory has a version per BLOCK bytes of the shard's own."""
    values = r.pull()
    for block in r.table.layout.blocks:
        for at in range(block.local // BLOCK * BLOCK, block.local + block.size, BLOCK):
            start, stop = max(at, block.local), min(at + BLOCK, block.local + block.size)
            flat = block.start - block.local
            low, high = values[(start + flat) // 4 : (stop + flat) // 4].aminmax()
            assert low == high, f"a block is torn: {low} to {high}"
            assert low <= last, "a read went back in time"
    return float(values.max())


def test_a_stray_write_into_values_hurts_nobody_and_is_healed(
    processes: Launcher, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for key, value in processes.environment().items():
        monkeypatch.setenv(key, value)
    clients = [headwater.connect(rank=rank, world=2) for rank in (0, 1)]
    with clients[0], clients[1]:
        tables = [client.dense(name, (10_000,), lr=1.0, sync=Bulk()).table for client in clients]
        assert all(table.live for table in tables)
        tables[0].values[name].fill_(99.0)
        assert tables[1].values[name].eq(0).all()
        step_all(tables, name)
        assert tables[1].values[name].eq(-1).all(), "the servers work with their own"
        assert tables[0].values[name].eq(99).all(), "pages that were written stay this process's own"
        tables[0].refresh()
        assert tables[0].values[name].eq(-1).all()
        step_all(tables, name)
        assert tables[0].values[name].eq(-2).all()


def step_all(tables: list[DenseTable], name: str) -> None:
    tickets = []
    for table in tables:
        table.gradients[name].fill_(1.0)
        table.push([name])
        tickets.append(table.step())
    for ticket in tickets:
        ticket.wait()


def test_a_ticket_keeps_its_own_answer(connect: Connect, name: str) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, (3,), lr=1.0)
    tickets = [w.push(torch.ones(3)) for _ in range(3)]
    w.table.wait()
    assert [ticket.wait().clock for ticket in reversed(tickets)] == [3, 2, 1]
    assert all(ticket.done() for ticket in tickets)
    assert client.statistics().steps == 3


def test_the_statistics_count_steps_and_bytes(connect: Connect, name: str) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, (100_000,), lr=1.0)
    before = client.statistics()
    for _ in range(4):
        w.push_pull(torch.ones(100_000))
    found = client.statistics()
    assert found.steps == 4
    assert found.pushed_bytes - before.pushed_bytes >= 4 * 400_000
    assert found.pulled_bytes - before.pulled_bytes >= 4 * 400_000
    assert (found.staleness_max, found.lag_max) == (0, 0)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A worker of a cluster in which both sides check payloads."""
    monkeypatch.setenv("HEADWATER_TRANSPORT", "tcp")
    monkeypatch.setenv("HEADWATER_CHECKSUM", "1")
    with Launcher(1, advertise=False) as job:
        for key, value in job.environment().items():
            monkeypatch.setenv(key, value)
        with headwater.connect(rank=0, world=1, timeout=PATIENCE) as client:
            yield client


def test_a_payload_byte_that_flips_on_the_way_is_noticed_by_either_side(
    checked: Client, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    w = checked.dense(name, (50_000,), lr=1.0)
    w.push(torch.ones(50_000)).wait()
    send = SocketChannel.send
    flips = 2

    def flip(
        self: SocketChannel, parts: Sequence[memoryview | bytes], fds: tuple[int, ...] = (), *, wait: bool = False
    ) -> int:
        nonlocal flips
        if parts[0][5] == Kind.PUSH and len(parts) > 1 and flips:
            flips -= 1
            damaged = bytearray(parts[1])
            damaged[len(damaged) // 2] ^= 1
            parts = [parts[0], memoryview(damaged)]
        return send(self, parts, fds, wait=wait)

    monkeypatch.setattr(SocketChannel, "send", flip)
    w.push(torch.ones(50_000)).wait()  # sent again over another connection
    assert flips == 0
    assert w.pull().eq(-2.0).all()
    flips = 1000
    with pytest.raises((ProtocolError, LinkBroken)):
        w.push(torch.ones(50_000)).wait()
    monkeypatch.setattr(SocketChannel, "send", send)
    with headwater.connect(role="reader") as other:
        values = other.dense(name, (50_000,), lr=1.0).pull()
    assert values.max() == -2.0, "what was damaged was not applied"
    assert all(value in (-2.0, -3.0) for value in values.tolist())

    damage = frames.check_payload

    def flip_back(frame: frames.Frame) -> None:
        if frame.payload is not None:
            frame.payload[len(frame.payload) // 2] ^= 1
        damage(frame)

    with headwater.connect(role="reader") as other:
        v = other.dense(name, (50_000,), lr=1.0)
        monkeypatch.setattr(receiver, "check_payload", flip_back)
        with pytest.raises(ProtocolError, match="the payload of DATA 0 was damaged on the way"):
            v.pull()
