"""The layout: every element in one place, whole where it must be, even where it can be, and the same for everybody."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import NotEnoughMemory, UnknownOptimizer, UsageError
from headwater.layout.dense import ALIGN, BLOCK, CHUNK, PAGE, Layout, check_table, layout
from headwater.types import ITEMSIZE, Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec, Stale


def table(*shapes: tuple[int, ...], optimizer: str = "SGD", name: str = "t", dtype: str = "float32") -> DenseSpec:
    parameters = tuple(ParameterSpec(f"p{i}", shape, dtype) for i, shape in enumerate(shapes))
    return DenseSpec(name, parameters, OptimizerSpec(optimizer, ({},)))


SHAPES = st.lists(st.integers(0, 700), max_size=3).map(tuple).filter(lambda shape: math.prod(shape) < 3_000_000)
PARAMETERS = st.lists(
    st.tuples(SHAPES, st.sampled_from(["float32", "bfloat16", "float64", "float16"]), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


def build(rows: Sequence[tuple[tuple[int, ...], str, int]], optimizer: str, name: str) -> DenseSpec:
    parameters = tuple(ParameterSpec(f"p{i}", s, d, g) for i, (s, d, g) in enumerate(rows))
    return DenseSpec(name, parameters, OptimizerSpec(optimizer, ({},) * 3))


def check_layout(spec: DenseSpec, plan: Layout, whole: bool) -> None:
    covered: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(spec.parameters))}
    for shard, segments in enumerate(plan.segments):
        ends = 0
        for s in segments:
            p = spec.parameters[s.parameter]
            itemsize = ITEMSIZE[p.dtype]
            assert s.nbytes == (s.stop - s.start) * itemsize
            assert s.offset % ALIGN == 0
            assert s.offset >= ends, "segments are sorted and disjoint"
            assert s.end <= plan.sizes[shard]
            assert s.start % CHUNK == 0, "sums do not depend on the cuts"
            ends = s.end
            covered[s.parameter].append((s.start, s.stop))
            if whole:
                assert (s.start, s.stop) == (0, p.numel)
            homes = [b for b in plan.blocks_of(shard) if b.local <= s.offset and s.end <= b.local + b.size]
            assert len(homes) == 1 or not s.nbytes, "an empty one may lie on a seam"
            flat = plan.offsets[s.parameter] + s.start * itemsize
            assert flat in [b.start + s.offset - b.local for b in homes], "side by side in the address space"
    for i, p in enumerate(spec.parameters):
        pieces = sorted(covered[i])
        assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])], "covered once, without a gap"
        assert pieces[-1][1] == p.numel


def check_blocks(plan: Layout) -> None:
    at = 0
    local = [0] * len(plan.sizes)
    for block in plan.blocks:
        assert block.start == at
        assert block.local == local[block.shard]
        assert block.start % PAGE == block.size % PAGE == block.local % PAGE == 0
        at += block.size
        local[block.shard] += block.size
    assert at == plan.size
    assert tuple(local) == plan.sizes


@given(PARAMETERS, st.integers(1, 7), st.sampled_from(["SGD", "AdamW", "Muon", "Adafactor"]), st.text(max_size=5))
@settings(max_examples=50, deadline=None)
def test_every_element_lies_in_one_place(
    rows: list[tuple[tuple[int, ...], str, int]], shards: int, optimizer: str, name: str
) -> None:
    spec = build(rows, optimizer, name)
    plan = layout(spec, shards)
    check_blocks(plan)
    check_layout(spec, plan, optimizer in ("Muon", "Adafactor"))
    assert plan.participants == tuple(s for s in range(shards) if plan.sizes[s])


@given(PARAMETERS, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_no_block_is_larger_than_one_frame_unless_a_tensor_must_stay_whole(
    rows: list[tuple[tuple[int, ...], str, int]], shards: int
) -> None:
    plan = layout(build(rows, "Adam", "t"), shards)
    assert all(block.size <= BLOCK for block in plan.blocks)


@given(st.lists(st.integers(1, 3_000_000), min_size=1, max_size=20), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_shards_are_of_about_the_same_size(numels: list[int], shards: int) -> None:
    """For tables of some MB: the fullest shard has at most a tenth, or half a block, more than the mean."""
    plan = layout(table(*((n,) for n in numels)), shards)
    total = sum(numels) * 4
    if total < 4 << 20:
        return
    mean = total / shards
    assert max(plan.sizes) <= 1.1 * mean + BLOCK / 2, (total, plan.sizes)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("megabytes", [4, 16, 64])
def test_one_large_tensor_is_split_evenly(megabytes: int, shards: int) -> None:
    plan = layout(table((megabytes << 18,)), shards)
    assert max(plan.sizes) / min(plan.sizes) <= 1.15, plan.sizes


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_a_thousand_small_tensors_are_spread_and_kept_whole(shards: int) -> None:
    plan = layout(table(*[(256,)] * 1000), shards)
    counts = [len(segments) for segments in plan.segments]
    assert sum(counts) == 1000
    assert max(counts) - min(counts) <= 8
    assert len(plan.blocks) == shards, "a frame per shard, not per tensor"


def test_small_tables_do_not_all_lie_on_the_first_shard() -> None:
    homes = [layout(table((10,), name=f"table {i}"), 4).participants for i in range(40)]
    assert set(homes) == {(0,), (1,), (2,), (3,)}


def test_the_layout_depends_on_shapes_and_not_on_policies() -> None:
    spec = table((300, 300), (7,), (5000, 40))
    for other in (
        msgspec.structs.replace(spec, sync=Bulk()),
        msgspec.structs.replace(spec, sync=Stale(4), max_grad_norm=1.0, seed=5, nonfinite="skip"),
        msgspec.structs.replace(spec, parameters=tuple(
            msgspec.structs.replace(p, init=Init("values")) for p in spec.parameters
        )),
        msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=DenseSpec),
    ):  # fmt: skip
        assert layout(other, 3) == layout(spec, 3)


def test_parameters_of_a_group_and_dtype_lie_together() -> None:
    rows = [((5,), "float32", 1), ((5,), "bfloat16", 0), ((5,), "float32", 0), ((5,), "bfloat16", 1)]
    plan = layout(build(rows, "SGD", "t"), 1)
    assert [s.parameter for s in plan.segments[0]] == [1, 2, 3, 0]


def test_a_huge_table_is_placed_in_a_moment() -> None:
    begun = time.process_time()
    spec = table((1 << 34,))  # 64 GiB
    check_table(spec)
    plan = layout(spec, 8)
    assert time.process_time() - begun < 5
    assert max(plan.sizes) - min(plan.sizes) <= BLOCK
    assert all(s.start % CHUNK == 0 for s in plan.segments[3][:100])


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        (table(), UsageError, "holds no elements"),
        (table((0,), (3, 0)), UsageError, "holds no elements"),
        (table((2, -3)), UsageError, "'p0' of shape"),
        (table((2,), dtype="complex64"), UsageError, "dtype 'complex64'"),
        (table((2,), dtype="complex64", optimizer="Assign"), UsageError, "dtype 'complex64'"),
        (table((1 << 40,)), NotEnoughMemory, "4.0 TiB"),
        (table((1 << 62, 1 << 62)), NotEnoughMemory, "TiB"),
        (table((2,), optimizer="LBFGS"), UnknownOptimizer, "LBFGS"),
        (table((2,), optimizer="Muon"), UnknownOptimizer, "2-D"),
        (msgspec.structs.replace(table((2,)), max_grad_norm=-1.0), UsageError, "max_grad_norm=-1.0"),
        (msgspec.structs.replace(table((2,)), max_grad_norm=math.nan), UsageError, "max_grad_norm=nan"),
        (msgspec.structs.replace(table((2,)), nonfinite="ignore"), UsageError, "nonfinite='ignore'"),
        (msgspec.structs.replace(table((2,)), parameters=(ParameterSpec("a", (1,)),) * 2), UsageError, "called 'a'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_that_cannot_be_is_refused_by_name(spec: DenseSpec, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check_table(spec)


def test_an_empty_parameter_among_others_is_fine() -> None:
    spec = table((5,), (0, 7), (3,))
    check_table(spec)
    plan = layout(spec, 2)
    check_layout(spec, plan, whole=False)


def test_no_shards_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        layout(table((5,)), 0)
