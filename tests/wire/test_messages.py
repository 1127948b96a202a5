"""Bodies: typed structs there and back, a ProtocolError for everything else, and no pickle anywhere."""

from __future__ import annotations

import ast
import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import headwater
from headwater.errors import ClusterError, HeadwaterError, ProtocolError, ShapeMismatch, WorkerLost, from_code
from headwater.types import Async, Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec, Stale
from headwater.wire import messages as m

SPEC = DenseSpec(
    "t",
    (ParameterSpec("w", (3, 4), init=Init("normal", 0.0, 0.02)), ParameterSpec("b", (4,), "bfloat16", 1)),
    OptimizerSpec("AdamW", ({"lr": 0.1, "betas": (0.9, 0.99), "fused": None}, {"amsgrad": True})),
    Bulk("sum"),
    1.0,
    "skip",
    7,
)
ENDPOINT = m.Endpoint(1, "tcp://h:1", "local://x", "id")
HOSTED = m.Hosted(0, 3, "primary", 9, (m.Commit(1, 4, 3, False, 2.0, 0.5),))
SHARD_VIEW = m.ShardView(0, 1, "tcp://h:1", "local://x", "id")
REQUESTS: list[m.Request] = [
    m.Join("worker", 5, "host", 9, 0, 2),
    m.Leave(),
    m.Declare(SPEC),
    m.Declare(msgspec.structs.replace(SPEC, sync=Stale(3), max_grad_norm=None)),
    m.Declare(msgspec.structs.replace(SPEC, sync=Async(4))),
    m.Initialised(1),
    m.Barrier("b", 3),
    m.Barrier("b", 3, b"said"),
    m.Status(),
    m.Find(2),
    m.Drain(1),
    m.TakeSnapshot(),
    m.Join("server", 5, "host", 9, address="tcp://h:1", resume=True, server=1, hosted=(HOSTED,)),
    m.PlanNext("data", 10, 2, 3, 4, True, 5, ((1, 2),)),
    m.Pause(paused=True),
    m.Create(1, SPEC),
    m.Open(5, -1, 0, 4),
    m.Attach(1, True, 4096, 7),
    m.Follow(1, 2, 3, 4),
    m.Slots(1),
    m.SlotPart(1, (m.Slot(0, "exp_avg", 0, (2,), "float32", b"12345678"),), False),
]
REPLIES: list[m.Reply] = [
    m.Joined(1, 2, 0.5, (SHARD_VIEW,), 3, True),
    SHARD_VIEW,
    m.Welcome(0, 2, 2, 1, "memory", 0.5, True),
    m.Declared(1, SPEC, True, 3),
    m.Done(),
    m.ClusterStatus(
        1.0,
        2,
        2,
        1,
        (m.ServerStatus(0, "tcp://h:1", 9, "alive", (0,), (1,), (2,), 3, 4, 5, 6, 7.0),),
        (m.ShardStatus(0, 4, 0, (1,), (2,), 9, 1, 2, 2),),
        (m.WorkerStatus(0, "worker", 9, "alive", 1, 2, 3, 4, 0.5),),
        (m.TableStatus("t", 1, 2, 3, 4, "SGD", "Bulk()", 5, (6, 7)),),
    ),
    m.SnapshotTaken("snapshots/3", 99, 1.5),
    m.Following(2, 3, True),
    m.PlanChunk(1, 2, 3, 4),
    m.Paused(5),
    m.Created(1, 99),
    m.Opened(3, 9),
    m.Attached(4, 5, 6, 7, 8),
]
NOTICES: list[m.Notice] = [
    m.Members(3, (0, 2), 2, "worker 1 died", (70, 72)),
    m.Ready(1, 0, 4, 3, (1.5, 1e-17), False),
    m.Commit(1, 4, 3, False, 2.0, 0.5),
    m.Heartbeat(1, 2, 3, 4, 5, 6, ((1, 9),), ((0, 7, 2),), 1),
    m.Drop(3),
    m.View(0, 3, ENDPOINT, (ENDPOINT,), (ENDPOINT,)),
    m.View(0, 3, None),
    m.Synced(0, 3, 1, 9),
    m.Suspect(0, 3, 1, "silent"),
    m.Cut(1, 0, "snapshots/1", ((1, 5),)),
    m.CutDone(1, 0, "0.safetensors", 9, "ab", 3, ((1, 5),), 0.1, ""),
]
DECODERS: list[Callable[[bytes], object]] = [
    m.unpack_request,
    m.unpack_reply,
    m.unpack_notice,
    lambda data: m.unpack(data, m.StepBody),
    lambda data: m.unpack(data, m.Hello),
    lambda data: m.unpack(data, m.ErrorBody),
]


def test_every_message_comes_back() -> None:
    for request in REQUESTS:
        assert m.unpack_request(m.pack(request)) == request
    for reply in REPLIES:
        assert m.unpack_reply(m.pack(reply)) == reply
    for notice in NOTICES:
        assert m.unpack_notice(m.pack(notice)) == notice


def test_a_message_of_another_set_is_refused() -> None:
    for data, read in (
        (m.pack(m.Done()), m.unpack_request),
        (m.pack(m.Leave()), m.unpack_reply),
        (m.pack(m.Leave()), m.unpack_notice),
    ):
        with pytest.raises(ProtocolError, match="cannot be read"):
            read(data)


def test_unknown_fields_are_ignored_so_that_a_later_release_can_add_some() -> None:
    data = msgspec.msgpack.encode({"type": "barrier", "name": "x", "turn": 2, "colour": [1, {"deep": None}]})
    assert m.unpack_request(data) == m.Barrier("x", 2)


@pytest.mark.parametrize("field", ["shape", "dtype", "group", "init"])
def test_a_wrong_type_inside_a_table_is_refused(field: str) -> None:
    raw = msgspec.msgpack.decode(m.pack(m.Declare(SPEC)))
    raw["spec"]["parameters"][0][field] = {"no": "such"}
    with pytest.raises(ProtocolError, match=field):
        m.unpack_request(msgspec.msgpack.encode(raw))


def test_a_negative_bound_does_not_come_in_over_the_wire() -> None:
    raw = msgspec.msgpack.decode(m.pack(m.Declare(msgspec.structs.replace(SPEC, sync=Stale(1)))))
    raw["spec"]["sync"]["bound"] = -1
    with pytest.raises(ProtocolError, match="0 or more"):
        m.unpack_request(msgspec.msgpack.encode(raw))


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_noise_raises_nothing_but_a_protocol_error(noise: bytes) -> None:
    for decode in DECODERS:
        with contextlib.suppress(ProtocolError):
            decode(noise)


def test_damaged_messages_raise_nothing_but_a_protocol_error() -> None:
    chance = random.Random(5)
    bodies = [m.pack(message) for message in [*REQUESTS, *REPLIES, *NOTICES]]
    for _ in range(4000):
        data = bytearray(chance.choice(bodies))
        for _ in range(chance.randint(1, 3)):
            match chance.randint(0, 3):
                case 0:
                    data[chance.randrange(len(data))] = chance.randrange(256)
                case 1:
                    del data[chance.randrange(len(data)) :]
                case 2:
                    at = chance.randrange(len(data) + 1)
                    data[at:at] = chance.randbytes(chance.randint(1, 9))
                case 3:
                    data += chance.choice(bodies)
            if not data:
                break
        for decode in DECODERS:
            with contextlib.suppress(ProtocolError):
                decode(bytes(data))


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\xc7\xff\x01"])
def test_deep_nesting_and_false_lengths_are_refused(opening: bytes) -> None:
    for data in (opening * 100_000, b"\xdd\xff\xff\xff\xff" + opening, b"\xdf\xff\xff\xff\xff" + opening):
        for decode in DECODERS:
            with pytest.raises(ProtocolError):
                decode(data)


def test_errors_keep_their_class_and_message_on_the_way() -> None:
    for error in (WorkerLost("a"), ShapeMismatch("b"), ClusterError("c")):
        found = m.read_error(m.error_body(error))
        assert (type(found), str(found)) == (type(error), str(error))
    assert type(from_code("SystemExit", "x")) is ClusterError
    assert type(from_code("HeadwaterError", "x")) is HeadwaterError


def test_no_module_imports_pickle_or_runs_code_that_came_from_elsewhere() -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "_pickle"}
    calls = {"eval", "exec"}
    guilty = []
    for path in sorted(Path(headwater.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls
            loads = isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save")
            if banned & set(names) or called or loads:
                guilty.append(f"{path}:{getattr(node, 'lineno', 0)}")
    assert not guilty
