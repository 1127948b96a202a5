"""A data plan with real workers, one of which is killed in the middle of its work."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from headwater.launch import Launcher, Process, Rules

SAMPLES, EPOCHS, BATCH = 240, 2, 8

WORKER = """
import contextlib, os, signal, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import headwater

samples, epochs, batch, (policy, marker) = *map(int, sys.argv[1:4]), sys.argv[4:]
torch.manual_seed(0)
x = torch.randn(samples, 400)
data = TensorDataset(torch.arange(samples), x, (x[:, 0] > 0).long())
model = torch.nn.Linear(400, 500)  # lies on both servers, so the coordinator decides the steps
sync = headwater.Bulk() if policy == "bulk" else headwater.Async()
with headwater.Optimizer(model, torch.optim.SGD, lr=0.1, sync=sync) as opt:
    sampler = headwater.data.shards(samples, epochs, chunk=batch)
    loader = DataLoader(data, batch, sampler=sampler)
    trained = 0
    for epoch in sampler.epochs():
        for indices, x, y in loader:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            sampler.commit(len(y))
            print("trained", *indices.tolist(), flush=True)
            trained += 1
            if trained == 8:  # the first to come here
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("policy", ["bulk", "async"])
def test_a_worker_that_is_killed_leaves_no_sample_out(policy: str, tmp_path: Path) -> None:
    trained: Counter[int] = Counter()
    notes: list[str] = []

    def hear(process: Process, stream: str, line: str) -> None:
        if line.startswith("trained"):
            trained.update(int(word) for word in line.split()[1:])

    with Launcher(2, rules=Rules(elastic=True), on_line=hear, on_note=notes.append, advertise=False) as job:
        arguments = [str(SAMPLES), str(EPOCHS), str(BATCH), policy, str(tmp_path / "killed")]
        job.start_workers([sys.executable, "-c", WORKER, *arguments], 2)
        outcome = job.wait()
    assert outcome.code == 0, outcome
    assert any("was killed by SIGKILL" in note for note in notes)
    assert len(trained) == SAMPLES
    assert min(trained.values()) == EPOCHS
    again = sum(trained.values()) - SAMPLES * EPOCHS
    assert again <= 2 * BATCH  # the chunk that was begun, and one that was not reported yet
