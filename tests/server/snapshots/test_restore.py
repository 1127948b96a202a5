"""What comes back: the same bits on any number of shards, and never anything damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from headwater.errors import SnapshotCorrupt, TableConflict, UnknownTable, UsageError
from headwater.server.snapshots import manifest, restore
from headwater.server.snapshots.format import CHUNK, Mark, SessionMark, Written
from headwater.server.tables.dense import DenseShard
from headwater.server.tables.dense.saved import load
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec
from tests.server.snapshots import scene
from tests.server.tables.dense.tools import table

OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("AdamW", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "fused": False}),
    ("Adagrad", {"lr": 0.01, "initial_accumulator_value": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("NAdam", {"lr": 0.01}),
    ("ASGD", {"lr": 0.01}),
    ("Rprop", {"lr": 0.01}),
    ("Assign", {}),
]
MATRIX = [("Muon", {"lr": 0.01}), ("Adafactor", {"lr": 0.01})]


@pytest.mark.parametrize(("name", "hyper"), OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_number_of_shards_goes_on_to_the_bit(
    name: str, hyper: dict[str, float], steps: int, dtype: str, tmp_path: Path
) -> None:
    spec = table(name, [(n,) for n in scene.SIZES], dtype, groups=[hyper])
    _goes_on(spec, steps, tmp_path)


@pytest.mark.parametrize(("name", "hyper"), MATRIX)
@pytest.mark.parametrize("steps", [0, 3])
def test_matrix_optimizers(name: str, hyper: dict[str, float], steps: int, tmp_path: Path) -> None:
    shapes = [(5, 7), (100, 30), (1, 1)] + ([(12,), (4, 3, 2)] if name == "Adafactor" else [])
    _goes_on(table(name, shapes, groups=[hyper]), steps, tmp_path)


def _goes_on(spec: DenseSpec, steps: int, root: Path) -> None:
    """Snapshot on 2 shards, restore onto 3: what follows is what would have followed."""
    old, stepper = scene.filled(spec, 2), scene.Stepper()
    for _ in range(steps):
        stepper.step(old)
    scene.take(root, {0: old}, clock=steps)
    new = scene.back(root, spec, 3, seed=5)
    scene.assert_same(old, new)
    new.assert_padding_is_zero()
    for _ in range(2):
        stepper.step(old, new)
    scene.assert_same(old, new)


def test_hyperparameters_that_changed_come_back(tmp_path: Path) -> None:
    """A scheduler changed the rate, and momentum came with it: the slot exists only since then."""
    spec = table("SGD", [(100,)], groups=[{"lr": 0.1}])
    old, stepper = scene.filled(spec, 1), scene.Stepper()
    number, folder = manifest.start(tmp_path)
    capture = scene.Capture(folder, number, 0, threads=False)
    capture.prepare(0, old.shards[0])
    old.shards[0].set_groups([{"lr": 0.5, "momentum": 0.9}])
    stepper.step(old)
    capture.begin(Mark(0, 1, groups=tuple(old.shards[0].groups)), old.shards[0])
    capture.seal(1, ())
    assert capture.advance(100)
    written = capture.result()
    assert written is not None
    manifest.publish(tmp_path, number, [written], {0: spec}, 1)
    new = scene.back(tmp_path, spec, 2)
    assert new.shards[0].groups[0]["lr"] == 0.5
    stepper.step(old, new)
    scene.assert_same(old, new)


def test_two_tables_and_what_the_manifest_says(tmp_path: Path) -> None:
    model, counts = table("AdamW", [(50,)]), table("Assign", [(5,)], "int64", groups=[{}])
    counts = DenseSpec("counts", counts.parameters, counts.optimizer)
    tables = {3: scene.filled(model, 2), 4: scene.filled(counts, 2)}
    made = scene.take(tmp_path, tables, clock=7, plan=b"\x00plan")
    with restore.newest(tmp_path).snapshot as snapshot:
        assert snapshot.manifest == made
        assert snapshot.number == 1
        assert snapshot.manifest.plan == b"\x00plan"
        assert snapshot.manifest.created.startswith("2001-09-09")
        assert snapshot.table("counts").mark.clock == 7
        assert snapshot.sessions(1) == (SessionMark(1001, 0, ((0, 7),)),)
        assert [file.lsn for file in snapshot.manifest.files] == [70, 71]
        assert snapshot.read("counts", 0, "value", 1, 4).tolist() == tables[4].values()[0][1:4].tolist()
        assert snapshot.read("t", 0, "exp_avg", 0, 2).tolist() == [0, 0]  # not stepped: not stored
        snapshot.verify(sha256=True)
        with pytest.raises(UnknownTable, match="it has: counts, t"):
            snapshot.table("x")


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    spec = table("AdamW", [(3, 5), (7,)])
    old, stepper = scene.filled(spec, 1), scene.Stepper()
    stepper.step(old)
    scene.take(tmp_path, {0: old})
    with safe_open(tmp_path / "00000001" / "shard-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("t0.p0.value.0:15").view(3, 5), old.values()[0])
        assert file.get_tensor("t0.p1.count.@0").item() == 1
        assert set(file.keys()) >= {"t0.p1.exp_avg.0:7", "t0.p1.exp_avg_sq.0:7", "checksums"}


def test_a_shard_without_a_part_of_the_table(tmp_path: Path) -> None:
    scene.take(tmp_path, {0: scene.filled(table("AdamW", [(3,)]), 4)})
    assert len(scene.back(tmp_path, table("AdamW", [(3,)]), 1).values()[0]) == 3


def test_another_table_is_refused(tmp_path: Path) -> None:
    scene.take(tmp_path, {0: scene.filled(table("AdamW", [(3,)]), 1)})
    with restore.newest(tmp_path).snapshot as snapshot:
        for other in (table("AdamW", [(4,)]), table("SGD", [(3,)])):
            with pytest.raises(TableConflict, match="nothing was read"):
                load(snapshot, DenseShard(other, (), 0, torch.empty(0, dtype=torch.uint8)))


def test_large_and_small_pieces_over_chunks(tmp_path: Path) -> None:
    """Pieces that begin and end anywhere in a chunk."""
    rng = random.Random(1)
    sizes = [rng.randrange(1, 400_000) for _ in range(12)]
    spec = DenseSpec("t", tuple(ParameterSpec(f"p{i}", (n,)) for i, n in enumerate(sizes)), OptimizerSpec("SGD", ({},)))
    old = scene.filled(spec, 2)
    scene.take(tmp_path, {0: old})
    with restore.newest(tmp_path).snapshot as snapshot:
        for index, value in enumerate(old.values()):
            lo, hi = sorted((rng.randrange(sizes[index] + 1), rng.randrange(sizes[index] + 1)))
            assert torch.equal(snapshot.read("t", index, "value", lo, hi), value[lo:hi])


def test_what_json_cannot_say(tmp_path: Path) -> None:
    """An infinite bound measures the norm and never clips."""
    spec = table("SGD", [(3,)], max_grad_norm=float("inf"))
    made = scene.take(tmp_path, {0: scene.filled(spec, 1)})
    with restore.newest(tmp_path).snapshot as snapshot:
        assert snapshot.table("t").spec == spec
        assert snapshot.manifest == made


def test_a_coordinator_needs_no_torch() -> None:
    code = "import sys, headwater.server.snapshots.opened; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- damage --------------------------------------------------------------------------------------


def _two(root: Path) -> None:
    for clock in (1, 2):
        scene.small(root, float(clock), clock)


@pytest.mark.parametrize("seed", range(30))
def test_any_byte_of_the_newest_may_be_wrong(seed: int, tmp_path: Path) -> None:
    """It is refused by name, and the one before is used."""
    _two(tmp_path)
    rng = random.Random(seed)
    victim = rng.choice(sorted((tmp_path / "00000002").iterdir()))
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    try:
        found = restore.newest(tmp_path)
    except UsageError:
        pytest.fail("none was found")
    with found.snapshot as snapshot:
        if snapshot.number == 2:  # a change that JSON does not see: white space, or the case of a letter in base64
            assert victim.name == "manifest.json"
            assert snapshot.manifest == manifest.read(tmp_path / "00000002")
            assert scene.values_of(snapshot) == {2.0}
        else:
            assert scene.values_of(snapshot) == {1.0}
            (error,) = found.refused
            assert "00000002" in str(error)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.999])
def test_a_file_that_is_cut_short(keep: float, tmp_path: Path) -> None:
    _two(tmp_path)
    victim = tmp_path / "00000002" / "shard-00001.safetensors"
    size = victim.stat().st_size
    os.truncate(victim, keep if isinstance(keep, int) else int(size * keep))
    found = restore.newest(tmp_path)
    with found.snapshot as snapshot:
        assert snapshot.number == 1
    assert "shard-00001" in str(found.refused[0])


def test_a_file_of_another_snapshot(tmp_path: Path) -> None:
    _two(tmp_path)
    shutil.copy(tmp_path / "00000001" / "shard-00001.safetensors", tmp_path / "00000002")
    found = restore.newest(tmp_path)
    found.snapshot.close()
    assert "another file than the manifest's" in str(found.refused[0])


def test_a_missing_file_and_a_named_snapshot(tmp_path: Path) -> None:
    _two(tmp_path)
    (tmp_path / "00000002" / "shard-00000.safetensors").unlink()
    with pytest.raises(SnapshotCorrupt, match=r"00000002.*No such file"):
        restore.newest(tmp_path / "00000002")
    with restore.newest(tmp_path / "00000001").snapshot as snapshot:
        assert scene.values_of(snapshot) == {1.0}


def test_none_is_sound(tmp_path: Path) -> None:
    _two(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(SnapshotCorrupt, match=r"no sound snapshot.*00000002.*00000001"):
        restore.newest(tmp_path)


def test_snapshots_of_another_format_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """Of release 0.9: the manifest's tables have no kind."""
    _two(tmp_path)
    for path in tmp_path.glob("*/manifest.json"):
        said = json.loads(path.read_text())
        said["format"] = 1
        for each in said["tables"]:
            del each["spec"]["kind"]
        path.write_text(json.dumps(said))
    with pytest.raises(SnapshotCorrupt, match=r"00000002.*has format 1, .* reads format 2.*headwater export"):
        restore.newest(tmp_path)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 4, "they were left as they are"


def test_a_shards_file_of_another_format(tmp_path: Path) -> None:
    _two(tmp_path)
    path = tmp_path / "00000002" / "shard-00000.safetensors"
    data = path.read_bytes()
    assert data.count(b'"headwater":"2"') == 1
    path.write_bytes(data.replace(b'"headwater":"2"', b'"headwater":"1"'))
    with pytest.raises(SnapshotCorrupt, match=r"shard-00000.*has format 1, this Headwater reads format 2"):
        restore.newest(tmp_path / "00000002")


def test_there_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(UsageError, match="holds no finished snapshot"):
            restore.newest(path)


def test_damage_that_comes_after_the_check(tmp_path: Path) -> None:
    """Each part is checked again by whoever reads it."""
    old = scene.filled(table("SGD", [(2 * CHUNK // 4,)]), 1)
    scene.take(tmp_path, {0: old})
    with restore.newest(tmp_path).snapshot as snapshot:
        path = tmp_path / "00000001" / "shard-00000.safetensors"
        with path.open("r+b") as file:
            file.seek(path.stat().st_size - CHUNK - CHUNK // 2)
            file.write(b"\x55\xaa")
        assert snapshot.read("t", 0, "value", CHUNK // 4, 2 * CHUNK // 4).numel()
        with pytest.raises(SnapshotCorrupt, match="fail their checksum"):
            snapshot.read("t", 0, "value", 100, 200)


def test_only_sha256_sees_a_change_with_new_checksums(tmp_path: Path) -> None:
    _two(tmp_path)
    folder = tmp_path / "00000002"
    made = manifest.read(folder)
    entry = made.files[0]
    wrong = Written(entry.name, entry.nbytes, "0" * 64)
    other = Written(made.files[1].name, made.files[1].nbytes, made.files[1].sha256)
    manifest.publish(tmp_path, 2, [wrong, other], {0: scene.SMALL}, 2)
    with restore.newest(tmp_path).snapshot as snapshot, pytest.raises(SnapshotCorrupt, match="SHA-256"):
        snapshot.verify(sha256=True)


def test_a_file_is_no_snapshot(tmp_path: Path) -> None:
    for name in ("file", "00000001", "manifest.json"):
        (tmp_path / name).write_text("x")
        with pytest.raises(UsageError, match="is a file, and a snapshot is a folder"):
            restore.newest(tmp_path / name)
