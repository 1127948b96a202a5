"""The race: what it looks for it finds, and a short one with a fault of each kind finds nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from headwater.layout.dense import layout
from headwater_bench import races
from headwater_bench.options import Options
from headwater_bench.races import counters, runner, values
from headwater_bench.targets import TARGETS


def tensors(steps: dict[str, int], step: int, model: str = values.MODEL) -> dict[str, torch.Tensor]:
    """A read of ``step``, in which these tensors are of other steps."""
    found = {}
    for name in values.NAMES[model]:
        count = values.COUNT[name]
        kind = torch.bfloat16 if name[0] == "h" else torch.float32
        found[name] = torch.from_numpy(values.number(name, count, steps.get(name, step))).to(kind)
    return found


@pytest.mark.parametrize("step", [0, 1, 63, 64, 250, 251, 30_000])
def test_a_whole_read(step: int) -> None:
    assert values.check(tensors({}, step), step) == values.ReadCheck("whole")


@pytest.mark.parametrize("name", sorted(values.NAMES[values.MODEL]))
def test_one_tensor_of_the_step_before_is_mixed(name: str) -> None:
    found = values.check(tensors({name: 999}, 1000), 1000)
    assert found.verdict == "mixed"
    assert f"'{name}': 999" in found.words


@pytest.mark.parametrize("name", sorted(values.NAMES[values.MODEL]))
def test_a_page_of_another_step_is_torn(name: str) -> None:
    """Also in the sparse table: a page has elements that change with each step."""
    read = tensors({}, 1000)
    elements = 4096 // read[name].element_size()
    assert values.check(read, 1000).verdict == "whole"
    read[name][elements : 2 * elements] = tensors({name: 1001}, 1001)[name][elements : 2 * elements]
    if len(read[name]) > elements:
        assert values.check(read, 1000).verdict == "torn"


def test_all_of_one_step_that_is_not_the_labels_is_mislabelled() -> None:
    assert values.check(tensors({}, 1001), 1000).verdict == "mislabelled"
    assert values.check({"d0": torch.zeros(1)}, 0).verdict == "mislabelled"


def test_a_large_read() -> None:
    assert values.check(tensors({}, 7, values.LARGE), 7, values.LARGE).verdict == "whole"
    read = tensors({}, 7, values.LARGE)
    read["l0"][-1] += 1
    assert values.check(read, 7, values.LARGE).verdict == "torn"


def test_gradients_lead_from_step_to_step() -> None:
    for name in values.NAMES[values.MODEL]:
        count = values.COUNT[name]
        value = torch.from_numpy(values.number(name, count, 0)).float()
        for step in range(1, 70):
            value -= values.gradient(name, count, step)
        assert bool((value == torch.from_numpy(values.number(name, count, 69))).all()), name


def test_all_tables_lie_on_every_shard() -> None:
    for spec in (*values.specs(values.MODEL), *values.specs(values.LARGE)):
        assert layout(spec, 3).participants == (0, 1, 2)


def test_counts_outlive_their_process(tmp_path: Path) -> None:
    path = tmp_path / "r0-0"
    with counters.Counters(path) as counts:
        counts.add("reads", 3)
        counts.failed("VersionExpired", "gone")
        counts.failed("NotEnoughMemory", "none\nleft")
    with counters.Counters(path) as counts:  # another start adds to it
        counts.add("reads")
    found = counters.read(path)
    assert (found["reads"], found["VersionExpired"], found["other"]) == (4, 1, 1)
    assert counters.said(path) == ["NotEnoughMemory: none left"]
    assert counters.read(tmp_path / "nobody") == Counter()


def test_faults_begin_with_one_of_each_and_are_drawn_from_the_seed() -> None:
    drawn = [next(it) for it in [runner.faults(Random(1))] for _ in range(60)]
    assert drawn == [next(it) for it in [runner.faults(Random(1))] for _ in range(60)]
    assert tuple(drawn[: len(runner.FIRST)]) == runner.FIRST
    assert {fault.role for fault in drawn} == {"server", "reader", "publisher", "coordinator", "relay"}
    assert max(fault.seconds for fault in drawn) >= runner.LONG


def test_a_short_race_with_a_fault_of_each_kind() -> None:
    said: list[str] = []
    run = races.race(Options(said.append), reads=1000, seconds=60.0, every=0.3)
    figures = {figure.name: figure for figure in races.figures(run)}
    words = "\n".join([*said, *run.words])
    assert all(figure.met is not False for figure in figures.values()), words
    targets = {name.removeprefix("races: ") for name in TARGETS if name.startswith("races: ")}
    assert {figure.name for figure in figures.values() if figure.target} == targets
    assert figures["reads"].value >= 1000
    assert figures["versions published"].value >= 1
    assert {fault.name for fault in runner.FIRST} <= set(run.struck)
    assert all(count["reads"] for count in run.kinds.values()), run.kinds
