"""The scheduler alone: who runs, in which row, and that rows and memory stay the same thing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.gateway.engine_types import GenerationRequest, QueueFull
from headwater.gateway.scheduler import Scheduler, Sequence

Made = Scheduler[str]


def sequence(name: str = "", prompt: int = 3, deadline: float | None = None) -> Sequence[str]:
    return Sequence(GenerationRequest((1,) * prompt, 10, deadline=deadline), name)


def names(sequences: object) -> list[str]:
    return [s.extra for s in sequences]  # type: ignore[attr-defined]


def read_all(made: Made, version: int) -> None:
    """Do what a plan says, as the engine would."""
    plan = made.plan(0.0, version)
    for chunk in plan.chunks:
        chunk.sequence.length = chunk.stop


def test_first_come_first_served() -> None:
    made = Made(slots=2, queue=8, chunk=100)
    for name in "abcd":
        made.add(sequence(name))
    assert names(made.plan(0.0, 1).begun) == ["a", "b"]
    assert made.plan(0.0, 1).begun == ()
    made.leave(made.batches[1][0])
    assert names(made.plan(0.0, 1).begun) == ["c"]
    assert names(made.waiting) == ["d"]


def test_the_queue_is_bounded_beside_the_slots() -> None:
    made = Made(slots=2, queue=1, chunk=100)
    for name in "abc":
        made.add(sequence(name))
    with pytest.raises(QueueFull, match="3 requests wait already"):
        made.add(sequence("d"))
    made.plan(0.0, 1)
    with pytest.raises(QueueFull):
        made.add(sequence("d"))
    made.leave(made.batches[1][0])
    made.add(sequence("d"))


def test_prompts_are_read_in_order_within_the_budget() -> None:
    made = Made(slots=4, queue=8, chunk=10)
    for name, prompt in (("a", 4), ("b", 15), ("c", 2)):
        made.add(sequence(name, prompt))
    steps = []
    for _ in range(3):
        plan = made.plan(0.0, 1)
        steps.append([(c.sequence.extra, c.start, c.stop) for c in plan.chunks])
        for chunk in plan.chunks:
            chunk.sequence.length = chunk.stop
    # Where b is cut does not depend on a: its values would.
    assert steps == [[("a", 0, 4)], [("b", 0, 10)], [("b", 10, 15), ("c", 0, 2)]]
    assert names(made.generating(1)) == ["a", "b", "c"]


def test_a_sequence_stays_on_the_version_that_was_newest() -> None:
    made = Made(slots=3, queue=8, chunk=100)
    made.add(sequence("a"))
    read_all(made, 1)
    made.add(sequence("b"))
    read_all(made, 2)
    assert {v: names(rows) for v, rows in made.batches.items()} == {1: ["a"], 2: ["b"]}
    assert made.plan(0.0, 3).versions == (1, 2)


def test_the_cancelled_and_the_late_are_over_wherever_they_are() -> None:
    made = Made(slots=1, queue=8, chunk=100)
    for name, deadline in (("running", None), ("waiting", None), ("late", 5.0), ("patient", 50.0)):
        made.add(sequence(name, deadline=deadline))
    read_all(made, 1)
    made.batches[1][0].cancelled = made.waiting[0].cancelled = True
    plan = made.plan(6.0, 1)
    assert [(s.extra, reason) for s, reason in plan.over] == [
        ("running", "cancelled"),
        ("waiting", "cancelled"),
        ("late", "deadline"),
    ]
    assert plan.versions == ()
    made.leave(plan.over[0][0])
    assert names(made.plan(6.0, 1).begun) == ["patient"]
    assert made.running == 1


Act = st.sampled_from(["add", "step", "leave", "swap"])


@given(st.lists(st.tuples(Act, st.integers(0, 50)), max_size=60))
def test_rows_follow_their_sequences(acts: list[tuple[str, int]]) -> None:
    """A memory of cells, moved as the scheduler says, always holds each sequence's own marks in its own row."""
    made = Made(slots=5, queue=100, chunk=7)
    memory: dict[int, list[list[str]]] = {}
    version = 1
    for number, (act, value) in enumerate(acts):
        running = [s for rows in made.batches.values() for s in rows]
        if act == "add":
            made.add(sequence(f"s{number}", 1 + value % 12))
        elif act == "swap":
            version += 1
        elif act == "leave" and running:
            gone = running[value % len(running)]
            assert gone.version
            rows = memory.setdefault(gone.version, [[] for _ in range(5)])  # it may leave before it wrote
            vacated = made.leave(gone)
            assert rows[vacated.row][: vacated.length] == [gone.extra] * vacated.length
            rows[vacated.row] = []
            for source, target, length in vacated.moves:
                assert rows[target] == [], "moved onto a row in use"
                rows[target], rows[source] = rows[source][:length], []
        else:
            for chunk in made.plan(0.0, version).chunks:
                _write(made, memory, chunk.sequence, chunk.stop - chunk.start)
            for each in made.plan(0.0, version).versions:
                for s in made.generating(each):
                    _write(made, memory, s, 1)
        for v, batch in made.batches.items():
            for row, member in enumerate(batch):
                assert memory.get(v, [[]] * 5)[row] == [member.extra] * member.length
            assert [m.decoding for m in batch] == sorted((m.decoding for m in batch), reverse=True)


def _write(made: Made, memory: dict[int, list[list[str]]], s: Sequence[str], count: int) -> None:
    assert s.version
    rows = memory.setdefault(s.version, [[] for _ in range(5)])
    rows[made.row(s)] += [s.extra] * count
    s.length += count
