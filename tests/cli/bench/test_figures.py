"""What each bench makes of its seconds and bytes; and that every target has a figure."""

from __future__ import annotations

import pytest

from headwater.cli.bench.dense import same_host_figures, tcp_figures
from headwater.cli.bench.many import TENSORS, many_figures
from headwater.cli.bench.memory import memory_figures
from headwater.cli.bench.report import Figure
from headwater.cli.bench.small import small_figures
from headwater.cli.bench.step import step_figures
from headwater.cli.bench.targets import TARGETS

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
    found = _by_name(step_figures(4, {"none": [0.10, 0.20], "headwater": [0.102, 0.204], "ddp": [0.15, 0.30]}))
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
        "step": [f for b in (1, 4) for f in step_figures(b, {s: [1.0] for s in ("none", "headwater", "ddp")})],
        "memory": memory_figures({world: [MB, MB] for world in (1, 2, 3)}, 0, MB, 1000),
    }
    with_target = {f"{bench}: {f.name}" for bench, figures in made.items() for f in figures if f.target}
    assert with_target == set(TARGETS)
