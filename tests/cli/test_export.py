"""``headwater export`` says what it read and what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.cli.export import export
from headwater.errors import SnapshotCorrupt
from tests.server.snapshots import scene


def test_the_newest_sound_one_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for clock in (1, 2):
        scene.small(tmp_path / "snapshots", float(clock), clock)
    (tmp_path / "snapshots" / "00000002" / "shard-00001.safetensors").write_bytes(b"no")
    export(tmp_path / "snapshots", tmp_path / "out", sha256=True)
    said, complained = capsys.readouterr()
    assert "snapshot 1 of 1970-01-01" in said
    assert "small at clock 1" in said
    assert "model.safetensors  2." in said
    assert "refused:" in complained
    assert "00000002/shard-00001.safetensors" in complained.replace("\n", "")


def test_a_named_one_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    scene.small(tmp_path, 1.0, 1)
    (tmp_path / "00000001" / "shard-00000.safetensors").unlink()
    with pytest.raises(SnapshotCorrupt, match="00000001"):
        export(tmp_path / "00000001", tmp_path / "out")
    assert not (tmp_path / "out").exists()
