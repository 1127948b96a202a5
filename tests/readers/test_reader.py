"""Readers: leases by name, tag and latest; memory that is shared, bytes and deltas that are exact; news; ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from headwater.client import Dense
from headwater.errors import DeadlineExceeded, LinkError, ShapeMismatch, UnknownVersion, UsageError
from headwater.readers import Reader, Weights, reading
from headwater.types import Async, Bulk
from tests.patience import PATIENCE
from tests.readers.conftest import Connect, Read

SHAPE = (1200, 500)  # 2.4 MB: on both servers


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def same(weights: Weights, wanted: dict[str, torch.Tensor]) -> bool:
    return set(weights) == set(wanted) and all(bits(weights[name]) == bits(wanted[name]) for name in wanted)


def leases(reader: Reader) -> list[int]:
    return [status.leases for status in reader.versions()]


def mapped_from(tensor: torch.Tensor) -> str:
    """What the kernel says the tensor's first byte is a mapping of: device and inode, and a name."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, device, inode, *path = line.split(maxsplit=5)
        start, stop = (int(x, 16) for x in span.split("-"))
        if start <= at < stop:
            return f"{device} {inode} {path[0] if path else ''}"
    raise AssertionError("it is mapped nowhere")


# ---- leases --------------------------------------------------------------------------------------------


def test_a_lease_by_name_by_tag_and_of_the_newest(connect: Connect, read: Read, name: str, transport: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, SHAPE)
    states = {}
    for i in range(3):
        w.push(torch.full(SHAPE, float(i + 1))).wait()
        info = ps.publish([w], f"v{i}", metadata={"i": str(i)}, tags=["prod"] if i == 1 else []).wait()
        states[info.name] = w.pull().clone()
    for asked, wanted in (("v0", "v0"), ("prod", "v1"), ("latest", "v2")):
        with reader.lease(asked) as weights:
            assert weights.version.name == wanted
            assert weights.version.metadata == {"i": wanted[1:]}
            assert same(weights, {name: states[wanted]})
    stats = reader.statistics()
    assert (stats.connected, stats.leases, stats.parts.damaged) == (True, 0, 0)
    assert (stats.fetched_bytes == 0) == (transport == "local")
    assert leases(reader) == [0, 0, 0]


def test_a_version_that_is_here_is_not_fetched_again(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, SHAPE)
    ps.publish([w], "v1").wait()
    first = reader.lease()
    parts = sum(reader.statistics().parts)
    second = reader.lease("v1")
    assert sum(reader.statistics().parts) == parts
    assert first[name].data_ptr() == second[name].data_ptr()
    assert leases(reader) == [2]
    first.release()
    first.release()
    assert leases(reader) == [1]
    with pytest.raises(UsageError, match="has ended; tensors taken before stay valid"):
        first[name]
    assert second[name].sum() == 0


def test_a_lease_that_is_dropped_ends_with_the_next_beat(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, (10,))
    ps.publish([w], "v1").wait()
    tensor = reader.lease()[name]
    gc.collect()
    assert reader.statistics().leases == 0
    reader._beat()
    assert leases(reader) == [0]
    assert tensor.sum() == 0


def test_what_there_is_not(connect: Connect, read: Read, name: str) -> None:
    reader = read()
    with pytest.raises(UnknownVersion, match=f"no version of '{name}' is published"):
        reader.lease()
    ps = connect()
    ps.publish([ps.dense(name, (10,))], "v1", tags=["prod"]).wait()
    with pytest.raises(UnknownVersion, match="no version or tag 'v7'; versions: v1; tags: latest, prod"):
        reader.lease("v7")
    with pytest.raises(UsageError, match="is no name"):
        reader.lease(1)  # type: ignore[arg-type]
    with reader.lease() as weights:
        assert weights.get("nope") is None
        with pytest.raises(KeyError):
            weights["nope"]
    assert leases(reader) == [0]


def test_weights_are_a_mapping_and_go_into_modules(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, (4, 3))
    w.push(torch.ones(4, 3)).wait()
    ps.publish([w], "v1").wait()
    with reader.lease() as weights:
        assert (list(weights), len(weights), name in weights) == ([name], 1, True)
        copied = weights.state_dict(copy=True)
        assert copied[name].data_ptr() != weights[name].data_ptr()
        target = {name: torch.zeros(4, 3), "more": torch.zeros(1)}
        weights.copy_to(target)
        assert bits(target[name]) == bits(weights[name])
        with pytest.raises(ShapeMismatch, match=r"has shape \(3, 4\) here and \(4, 3\) in version 'v1'"):
            weights.copy_to({name: torch.zeros(3, 4)})
        with pytest.raises(ShapeMismatch, match="which this model does not have"):
            weights.copy_to(torch.nn.Linear(3, 4))


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["local"], indirect=True)
def test_readers_of_one_host_look_at_the_servers_memory(connect: Connect, read: Read, name: str) -> None:
    ps = connect()
    w = ps.dense(name, SHAPE)
    ps.publish([w], "v1").wait()
    one, other = read().lease(), read().lease()
    assert one[name].data_ptr() != other[name].data_ptr()
    assert mapped_from(one[name]) == mapped_from(other[name])  # one inode: the same pages
    assert "memfd:headwater:version" in mapped_from(one[name])
    one[name][0, 0] = 99.0  # a stray write stays with its reader
    assert one[name][0, 0] == 99.0
    assert other[name].sum() == 0


def test_tensors_stay_whole_whatever_becomes_of_the_version(connect: Connect, read: Read, name: str) -> None:
    """It is retired under its lease, mapped twice, released, and its holders make others in used memory."""
    ps, reader = connect(), read()
    w = ps.dense(name, SHAPE)
    w.push(torch.ones(SHAPE)).wait()
    ps.publish([w], "v0", keep=1).wait()
    wanted = w.pull().clone()
    held = [reader.lease("v0")]
    tensors = [held[0][name]]
    for _ in range(2):  # mapped anew while the first mapping is still looked at
        reader._stored.clear()
        held.append(reader.lease("v0"))
        tensors.append(held[-1][name])
    held.pop().release()
    tensors.pop()
    reader._base = None
    gc.collect()
    reader._beat()  # says what is not mapped any more
    for weights in held:
        weights.release()
    for i in range(1, 6):
        w.push(torch.ones(SHAPE)).wait()
        ps.publish([w], f"v{i}", keep=1).wait()
        with reader.lease() as newest:
            assert bits(newest[name]) == bits(w.pull())
        assert all(bits(tensor) == bits(wanted) for tensor in tensors), f"changed by version {i}"
    assert [status.info.name for status in reader.versions()] == ["v5"]


def test_they_outlive_the_reader(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, SHAPE)
    ps.publish([w], "v1", keep=1).wait()
    weights = reader.lease()
    tensor = weights[name]
    reader.close()
    for i in range(2, 5):
        w.push(torch.ones(SHAPE)).wait()
        ps.publish([w], f"v{i}", keep=1).wait()
    assert tensor.sum() == 0
    weights.release()
    with pytest.raises(LinkError):
        reader.lease()
    reader.close()


# ---- bytes and deltas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "inproc"], indirect=True)
def test_chains_of_deltas_are_exact(connect: Connect, read: Read, name: str) -> None:
    """Tables of both word sizes and policies; few elements change, or none, or all."""
    ps, reader = connect(), read()
    tables: dict[str, Dense] = {
        f"{name}.fp32": ps.dense(f"{name}.fp32", SHAPE, sync=Bulk(), optimizer="AdamW", lr=0.01),
        f"{name}.bf16": ps.dense(f"{name}.bf16", SHAPE, dtype=torch.bfloat16, sync=Async(), lr=1.0),
        f"{name}.small": ps.dense(f"{name}.small", (3, 5), sync=Bulk()),
    }
    generator = torch.Generator().manual_seed(5)
    for step, share in enumerate((1.0, 0.01, 0.0, 0.01, 0.001, 0.7, 0.02, 0.0001)):
        for table in tables.values():
            gradient = torch.randn(tuple(table.values.shape), generator=generator).to(table.values.dtype)
            gradient[torch.rand(gradient.shape, generator=generator) >= share] = 0
            if "fp32" not in table.table.spec.name or share == 1.0 or step == 5:  # Adam moves all that ever moved
                table.push(gradient).wait()
        ps.publish(list(tables.values()), f"v{step}", model=name, keep=2).wait()
        with reader.lease() as weights:
            assert weights.version.name == f"v{step}"
            assert same(weights, {key: table.pull() for key, table in tables.items()}), f"step {step}"
    counts = reader.statistics().parts
    assert counts.deltas > 8
    assert (counts.shared_parts, counts.damaged) == (0, 0)
    late = read()
    with late.lease() as weights:
        assert same(weights, {key: table.pull() for key, table in tables.items()})
    assert late.statistics().parts.deltas == 0


@pytest.mark.parametrize("transport", ["local"], indirect=True)
def test_a_reader_that_does_not_share_fetches_over_the_same_socket(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read(share=False)
    w = ps.dense(name, SHAPE)
    ps.publish([w], "v1").wait()
    with reader.lease() as weights:
        assert weights[name].sum() == 0
    assert reader.statistics().fetched_bytes >= 4 * w.values.numel()


# ---- news ------------------------------------------------------------------------------------------------


def test_waiting_for_news(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, (10,))
    with pytest.raises(DeadlineExceeded):
        reader.wait(timeout=0.05)
    number = ps.publish([w], "v1").wait().number
    assert reader.wait().number == number
    with pytest.raises(DeadlineExceeded):
        reader.wait(after=number, timeout=0.05)
    with pytest.raises(DeadlineExceeded):
        reader.wait(name="prod", timeout=0.05)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(reader.wait(after=number).name)),
        threading.Thread(target=lambda: found.append(reader.wait(name="prod").name)),
    ]
    for thread in threads:
        thread.start()
    ps.publish([w], "v2", tags=["prod"]).wait()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == ["v2", "v2"]
    assert reader.statistics().connected


def test_many_threads_lease_release_and_read(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    w = ps.dense(name, (300, 300))
    sums = {}
    wrong: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with reader.lease() as weights:
                low, high = weights[name].aminmax()
                if low != high:
                    wrong.append(weights.version.name)

    ps.publish([w], "v0", keep=1).wait()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(1, 8):
        w.push(torch.ones(300, 300)).wait()
        sums[i] = ps.publish([w], f"v{i}", keep=1).wait()
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong
    assert reader.statistics().leases == 0
    assert leases(reader) == [0]


# ---- light -----------------------------------------------------------------------------------------------


def test_a_lease_waits_for_another_threads_fetch_no_longer_than_it_may(connect: Connect, read: Read, name: str) -> None:
    ps, reader = connect(), read()
    ps.publish([ps.dense(name, (3,))], "v1").wait()
    held, over = threading.Event(), threading.Event()

    def fetch() -> None:
        with reader._fetching:
            held.set()
            over.wait(PATIENCE)

    other = threading.Thread(target=fetch)
    other.start()
    assert held.wait(PATIENCE)
    with pytest.raises(DeadlineExceeded, match="another thread"):
        reader.lease(timeout=0.1)
    assert reader.statistics().leases == 0
    over.set()
    other.join()
    with reader.lease() as weights:
        assert weights.version.name == "v1"


def test_who_says_nothing_is_not_connected(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing breaks where a process is stopped or a network swallows what is sent."""
    reader = read()

    def silent(*_: object) -> None:
        raise DeadlineExceeded("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(reader._control, "ask", silent)
        reader._beat()
        assert reader.statistics().connected  # it was heard just now
        patch.setattr(reading, "QUIET", 0.0)
        reader._beat()
        assert (reader.statistics().connected, reader.statistics().error) == (False, "no answer in 3 s")
    reader._beat()
    assert reader.statistics().connected


def test_a_reader_is_light_to_import() -> None:
    code = (
        "import sys, headwater; headwater.reader; import headwater.readers.reading, headwater.readers.fetch\n"
        "heavy = {'torch', 'numba', 'transformers', 'starlette'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
