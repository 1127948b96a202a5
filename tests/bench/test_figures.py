"""What each bench makes of its seconds and bytes; and that every target has a figure."""

from __future__ import annotations

import pytest

from headwater_bench.commands import BENCHES
from headwater_bench.dense import same_host_figures, tcp_figures
from headwater_bench.goodput import Life, Observed, Span, contributing, goodput_figures, scaled
from headwater_bench.many import TENSORS, many_figures
from headwater_bench.memory import memory_figures
from headwater_bench.recovery import longest_gap, recovery_figures
from headwater_bench.replicas import push_figures
from headwater_bench.replicas import step_figures as replica_figures
from headwater_bench.report import Figure
from headwater_bench.serve import DTYPES, TOKENS, serve_figures
from headwater_bench.small import small_figures
from headwater_bench.snapshot import SnapshotRun, longest, read_figures, slowed, start_figures, write_figures
from headwater_bench.step import step_figures
from headwater_bench.targets import TARGETS
from headwater_bench.trainer import KINDS

MB = 2**20
SAME_HOST = {
    "ours": [0.011, 0.012, 0.030],
    "unchecked": [0.0105, 0.0105, 0.0295],
    "kernel": [0.010, 0.010, 0.028],
    "copied": [0.02] * 3,
    "gloo": [0.1] * 3,
}

SMALL = ("local", "tcp", "unpinned, local", "unpinned, tcp")


def _by_name(figures: list[Figure]) -> dict[str, Figure]:
    assert len({f.name for f in figures}) == len(figures)
    return {f.name: f for f in figures}


def test_dense_on_the_same_host() -> None:
    found = _by_name(same_host_figures("local", "SGD", SAME_HOST))
    assert found["local SGD time / kernel alone"].value == pytest.approx(1.1)
    assert found["local SGD unchecked time / kernel alone"].value == pytest.approx(1.05)
    assert found["local SGD push + apply + pull"].ceiling == pytest.approx(10.0)
    faster = found["local SGD speed-up over Gloo + step"]
    assert faster.value == pytest.approx(0.110 / 0.012)
    assert faster.ceiling == pytest.approx(11.0)
    assert faster.met is True


def test_dense_over_tcp_takes_the_kernel_off() -> None:
    seconds = {"ours": [0.060], "raw": [0.050], "kernel": [0.010]}
    found = _by_name(tcp_figures("AdamW", 64, seconds))
    assert found["tcp AdamW throughput / raw socket, without the kernel"].value == pytest.approx(1.0)
    assert found["tcp AdamW throughput / raw socket, with the kernel"].value == pytest.approx(5 / 6)
    assert found["tcp AdamW bytes both ways"].value == pytest.approx(2 * 64 * MB / 1e9 / 0.060)


def test_small_compares_medians_of_the_same_round() -> None:
    found = _by_name(small_figures("local", [[2e-5] * 9 + [9e-3], [8e-5] * 10], [[1e-5] * 10, [4e-5] * 10]))
    assert found["local p50 / raw socket"].value == pytest.approx(2.0)
    assert found["local p99"].value > found["local p50"].value


def test_many_is_per_tensor() -> None:
    found = _by_name(many_figures("tcp", {"ours": [0.005], "single": [0.03], "kernel": [0.002], "flat": [0.001]}))
    assert found["tcp time per tensor"].value == pytest.approx(0.005 / TENSORS * 1e6)
    assert found["tcp time per tensor"].ceiling == pytest.approx(1.0)


def test_step_puts_ddp_beside_it() -> None:
    found = _by_name(
        step_figures(
            4,
            {
                "none": [0.10, 0.20],
                "headwater": [0.102, 0.204],
                "overlap": [0.102, 0.204],
                "clip": [0.11, 0.22],
                "ddp": [0.15, 0.30],
            },
        )
    )
    assert found["batch 4 step / no synchronisation"].value == pytest.approx(1.02)
    assert found["batch 4 step / no synchronisation"].met is True
    assert found["batch 4 DDP over Gloo / no synchronisation"].value == pytest.approx(1.5)


def test_memory_takes_the_bare_interpreter_off() -> None:
    flat = [400 * MB] * 20
    growing = [400 * MB + i * MB for i in range(20)]
    found = _by_name(memory_figures({1: flat, 3: growing}, bare=140 * MB, needed=256 * MB, steps=1000))
    assert found["1 worker RSS / needed"].value == pytest.approx(260 / 256)
    assert found["1 worker growth over 1,000 steps"].value == pytest.approx(0)
    assert found["3 workers growth over 1,000 steps"].value == pytest.approx(20 / 256 * 100)
    assert found["3 workers growth over 1,000 steps"].met is False
    assert found["3 workers more than 1 worker"].value == pytest.approx(9.5 / 256 * 100)


COPIES = {"1": [0.10, 0.20], "2": [0.11, 0.22], "extra": [0.01, 0.01]}
EVENTS = {"primary killed": [0.1, 0.3, 0.2], "primary stopped": [1.1, 1.2, 1.3], "worker killed": [0.4, 0.6, 0.5]}
# A step takes 1 s, except the one that is under way when the snapshot begins.
SAVED = SnapshotRun(10.0, 14.0, 0.1, 500 * MB, [7.0, 8.0, 9.0, 10.0, 11.5, 12.5, 13.5, 14.5, 15.5], 3.0)
READ = {
    "read": [1.0, 2.0],
    "check": [0.5, 1.0],
    "load": [1.0, 2.0],
    "warm read": [0.2],
    "warm check": [0.1],
    "warm load": [0.5],
}

SERVED = {
    "together": [5.0, 6.0, 7.0],
    "together busy": [5.0, 5.0, 5.0],
    "generate": [20.0, 24.0, 21.0],
    "generate busy": [20.0, 20.0, 30.0],
    "first": [0.5, 1.0, 2.0],
    "equal": 1.0,
}
SWAPPED = {"pauses": [1e-3, 3e-3], "seconds": 2.0, "tokens": 100, "requests": 9, "failed": 1, "first": [0.3]}

ASKED = {"http": [8.0, 10.0], "engine": [6.0, 9.0], "first": [0.4, 0.6]}


def _storm() -> Observed:
    """Two workers that step ten times a second; in the second half one of them is away for 2 of 4 seconds."""
    first = [(i / 10, i) for i in range(80)]
    second = [(when, clock) for when, clock in first if not 4.0 <= when < 6.0]
    return Observed(
        [Span(0.0, 4.0)], [Span(4.0, 8.0)], first + second, [Life(-1.0, 9.0), Life(-1.0, 4.0), Life(5.0, 9.0)]
    )


def test_replicas_are_compared_round_by_round() -> None:
    found = _by_name(replica_figures("tcp", 1, COPIES))
    assert found["tcp batch 1 2 replicas / 1"].value == pytest.approx(1.1)
    assert found["tcp batch 1 2 replicas / 1"].ceiling == pytest.approx((1.1 + 1.05) / 2)
    assert found["tcp batch 1 2 replicas / 1"].met is True
    assert _by_name(push_figures("local", COPIES))["local 16 MB push, 2 replicas"].value == pytest.approx(165)


def test_a_snapshots_pause_is_what_a_step_takes_longer() -> None:
    assert longest(SAVED) == pytest.approx(0.5)
    assert slowed(SAVED) == pytest.approx((1.5 + 1 + 1 + 1) / 4)
    found = _by_name(write_figures([SAVED]))
    assert found["servers' pause / time to write"].value == pytest.approx(2.5)
    assert found["longest step, beyond the usual / time to write"].value == pytest.approx(12.5)
    assert found["longest step, beyond the usual / time to write"].met is False


def test_a_restore_is_compared_with_a_plain_read() -> None:
    found = _by_name(read_figures(READ))
    assert found["restore from disk, servers / plain read"].value == pytest.approx(1.0)
    assert found["restore from disk, with that check / plain read"].value == pytest.approx(1.5)
    assert found["restore from the page cache, with that check / plain read"].met is False
    more = _by_name(start_figures({"with": [5.0, 9.0], "without": [4.0, 4.0], "read": [1.0, 1.0]}))
    assert more["cluster start to first pull, more with it"].value == pytest.approx(3.0)


def test_recoveries_and_pauses() -> None:
    found = _by_name(recovery_figures(EVENTS, 0))
    assert found["primary killed, acknowledges again, p50"].value == 0.2
    assert found["primary killed, acknowledges again, p99"].value == 0.3
    assert found["worker killed, survivors' pause, longest"].value == 0.6
    assert longest_gap([1.0, 2.0, 5.0, 5.5, 9.0], 4.0, 8.0) == 3.0


def test_the_goodput_counts_contributions() -> None:
    found = _by_name(goodput_figures(_storm()))
    assert found["training lost per fault"].value == pytest.approx(1.0)  # 2 s of one worker of two
    assert found["faults an hour in the windows with faults"].value == pytest.approx(900)
    assert found["throughput at that rate / without"].value == pytest.approx(75)
    assert found["throughput with 125 faults an hour / without"].value == pytest.approx(100 * (1 - 125 / 3600))
    assert scaled(0.0) == 1.0


def test_a_process_that_starts_counts_as_live() -> None:
    course = _storm()
    # 1 s with one process, 1 s with two of which one starts, 2 s with both
    assert contributing(course.acks, course.lives, course.loud) == pytest.approx((10 + 5 + 20) / 40)


def test_streams_are_compared_round_by_round() -> None:
    found = _by_name(serve_figures("float32", SERVED, SWAPPED, ASKED))
    assert found["float32: streams / generate()"].value == pytest.approx(4)
    assert found["float32: streams / generate()"].met is True
    assert found["float32: 8 streams"].value == pytest.approx(8 * TOKENS / 6)
    assert found["float32: time to first token, all at once, p99"].value == 2
    assert found["float32: requests failed during 20 swaps"].met is False
    assert found["float32: swap pause of the engine, longest"].value == pytest.approx(3)
    assert found["float32: streams while versions change"].value == pytest.approx(50)
    assert found["float32: streams over HTTP / the engine alone"].value == pytest.approx((0.75 + 0.9) / 2)


def test_every_target_has_a_figure() -> None:
    made = {
        "dense": [
            *(f for name in ("SGD", "AdamW") for f in same_host_figures("local", name, SAME_HOST)),
            *(
                f
                for name in ("SGD", "AdamW")
                for f in tcp_figures(name, 64, {s: [1.0] for s in ("ours", "raw", "kernel")})
            ),
        ],
        "small": [f for name in SMALL for f in small_figures(name, [[1.0]], [[1.0]])],
        "many": [
            f
            for t in ("local", "tcp")
            for f in many_figures(t, {s: [1.0] for s in ("ours", "single", "kernel", "flat")})
        ],
        "step": [f for b in (1, 4) for f in step_figures(b, {s: [1.0] for s in KINDS})],
        "memory": memory_figures({world: [MB, MB] for world in (1, 2, 3)}, 0, MB, 1000),
        "replicas": [f for t in ("local", "tcp") for b in (1, 4) for f in replica_figures(t, b, COPIES)],
        "snapshot": [*write_figures([SAVED]), *read_figures(READ)],
        "recovery": [*recovery_figures(EVENTS, 0), *goodput_figures(_storm())],
        "serve": [f for d in DTYPES for f in serve_figures(d, SERVED, SWAPPED, ASKED)],
    }
    elsewhere = {"publish", "relay", "delta", "races"}  # by tests of their own, beside their other tests
    assert made.keys() | elsewhere == set(BENCHES)
    with_target = {f"{bench}: {f.name}" for bench, figures in made.items() for f in figures if f.target}
    assert with_target == {name for name in TARGETS if name.partition(":")[0] not in elsewhere}
