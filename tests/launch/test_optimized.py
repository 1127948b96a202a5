"""``PYTHONOPTIMIZE=2`` (no asserts, no docstrings) and closed standard streams change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

SCRIPT = """
import os, sys
import torch, headwater
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.1)
for fd in (1, 2):
    os.write(fd, b"")  # they are open, and nothing of ours
    assert os.readlink(f"/proc/self/fd/{fd}").startswith(("/dev/null", "pipe:", "/"))
for step in range(3):
    model(torch.ones(8, 4)).square().mean().backward()
    opt.step()
    opt.zero_grad()
with open(sys.argv[1], "a") as out:
    out.write(f"{model.weight.sum().item()!r}\\n")
opt.close()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def _values(script: Path, command: list[str], more: str = "", **env: str) -> set[str]:
    """What the script's workers computed; ``more``: redirections of a shell."""
    out = script.with_name("values")
    out.unlink(missing_ok=True)
    whole = " ".join([*command, str(script), str(out), more])
    done = subprocess.run(
        ["sh", "-c", whole], env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(out.read_text().split())


def test_scripts_and_clusters_run_the_same_without_asserts_and_docstrings(script: Path) -> None:
    plain = _values(script, [sys.executable, "-OO"])
    job = [sys.executable, "-m", "headwater", "run", "--servers", "1", "--workers", "2"]
    assert _values(script, job, PYTHONOPTIMIZE="2") == plain


def test_the_help_is_there_without_docstrings() -> None:
    for words in (["--help"], ["train", "lm", "--help"]):
        command = [sys.executable, "-OO", "-m", "headwater", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        assert "--help" in done.stdout


def test_closed_standard_streams_do_not_end_a_script_or_a_cluster(script: Path) -> None:
    plain = _values(script, [sys.executable], ">&- 2>&- <&-")
    job = [sys.executable, "-m", "headwater", "run", "--servers", "1", "--workers", "1"]
    assert _values(script, job, ">&- 2>&- <&-") == plain
