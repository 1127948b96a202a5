"""``bench publish``: its arithmetic, and one run with real processes and next to nothing to copy."""

from __future__ import annotations

import pytest
import torch

import headwater
from headwater_bench import publish
from headwater_bench.options import MEBIBYTE, Options
from headwater_bench.plain import Copier, Raw
from headwater_bench.published import spec
from headwater_bench.report import Figure
from headwater_bench.targets import TARGETS


def _values(figures: list[Figure]) -> dict[str, float]:
    return {f.name: f.value for f in figures}


def _all() -> list[Figure]:
    """Every figure, of samples that are easy to follow: three rounds, the middle one decides."""
    samples = {"publish": [0.1, 0.2, 0.3], "memcpy": [0.1, 0.1, 0.1]}
    steps = {"with": [1.01, 1.02, 1.0], "without": [1.0, 1.0, 1.1]}
    found = []
    for name in publish.SHORT.values():
        found += publish.publish_figures(name, 500 * MEBIBYTE, samples, [0.001, 0.002, 0.003])
        found += publish.first_figures(name, [5.0, 1.0, 1.0, 1.0])
        for computes in (True, False):
            found += publish.pause_figures(name, computes, steps, [0.003, 0.004, 0.005], samples["publish"])
    for size in (*publish.SMALL, 500):
        found += publish.lease_figures(f"{size} MB", [0.0005] * 99 + [0.002], 0.1, 0.004)
    found += publish.copy_figures(
        10**9, {"copy": [0.2] * 3, "one": [0.1] * 3, "memcpy": [0.1, 0.15, 0.2], "tensors": [0.19] * 3, "first": [1]}
    )
    found += publish.fetch_figures(10**9, {"fetch": [0.5] * 3, "both": [1.0] * 3, "raw": [0.4, 0.45, 0.5]})
    for name in ("local", "tcp"):
        found += publish.swap_figures(name, [0.001, 0.002, 0.003], [0.1, 0.1, 0.1])
    return found


def test_the_figures() -> None:
    found = _values(_all())
    assert found["bf16 publish / one memcpy"] == pytest.approx(2)
    assert found["bf16 publish, the call"] == pytest.approx(2)
    assert found["bf16 first publication / one memcpy"] == pytest.approx(5)
    assert found["bf16 first 4 publications / one memcpy"] == pytest.approx(2)
    assert found["fp32 in a trainer that computes: step, more with one"] == pytest.approx(10)
    assert found["fp32 in a trainer that computes: step, more with one / publish"] == pytest.approx(5)
    assert found["bf16 right before a push: servers' pause"] == pytest.approx(4)
    assert (found["lease of 50 MB, p50"], found["lease of 50 MB, p99"]) == (0.5, 0.5)
    assert found["local copy-out"] == pytest.approx(5)
    assert found["local copy-out / memcpy"] == pytest.approx(0.75)
    assert found["local copy-out by one thread / memcpy"] == pytest.approx(1.5)
    assert found["local copy-out by one thread / copies of such tensors"] == pytest.approx(1.9)
    assert found["tcp fetch / raw socket"] == pytest.approx(0.9)
    assert found["tcp follower: swap / synchronisation"] == pytest.approx(2)


def test_every_target_is_a_figures() -> None:
    names = {f"publish: {f.name}" for f in _all()}
    assert {key for key in TARGETS if key.startswith("publish: ")} <= names


@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 25), ("float32", 25)])
def test_the_table_has_the_size_that_was_asked_for(dtype: str, count: int) -> None:
    table = spec("m", 50 * MEBIBYTE, dtype)
    assert (len(table.parameters), sum(p.nbytes for p in table.parameters)) == (count, 50 * MEBIBYTE)
    assert sum(p.nbytes for p in spec("m", MEBIBYTE, dtype).parameters) == MEBIBYTE


def test_every_version_is_another_in_every_element() -> None:
    with headwater.connect("inproc://bench-publish", rank=0, world=1, servers=2) as client:
        publisher = publish.PublishedTable(client, "m", MEBIBYTE, "bfloat16")
        names = [publisher.next().name for _ in range(2)]
        with headwater.reader("m", "inproc://bench-publish") as reader, reader.lease(names[1]) as weights:
            new = torch.cat([tensor.flatten() for tensor in weights.values()])
        assert new.eq(3).all()  # a step when it began, and one before each version
        assert publisher.publish().info.parent == 2


def test_ceilings_take_time() -> None:
    assert Copier(1 << 16).copy() > 0
    raw = Raw(1 << 16)
    assert raw.receive() > 0
    raw.close()


def test_one_round_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SMALL", ()), ("LEASES", 1), ("REUSED", 0), ("COMPUTE", 1e-3), ("DTYPES", ("bfloat16",))):
        monkeypatch.setattr(publish, name, value)
    threads = torch.get_num_threads()
    found = publish.measure(Options(lambda text: None, rounds=1, version=2))
    assert torch.get_num_threads() == threads
    assert [f.name for f in found if not f.value >= 0] == []
    assert _values(found)["bf16 size"] == 2
    assert len(found) == len({f.name for f in found})
