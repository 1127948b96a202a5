"""``headwater relay`` beside a cluster of processes: its lines, its end, and a server that dies under it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import headwater
from headwater.cli.environment import exported
from headwater.launch import Launcher, Shape
from tests.patience import PATIENCE


class Command:
    """A running ``headwater relay --json``."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headwater", "relay", "--model", "lm", "--json", *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.address = self.line()["address"]

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def taken(self, name: str) -> dict[str, Any]:
        """Read on until it has taken this version."""
        while True:
            line = self.line()
            if line["event"] == "taken" and line["version"]["name"] == name:
                return line

    def end(self) -> int:
        self.process.terminate()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def relay(*words: str) -> Iterator[Command]:
    command = Command(*words)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()


@pytest.fixture(autouse=True)
def _private_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_server_dies_under_a_relay_and_versions_go_on() -> None:
    with (
        Launcher(Shape(2, replicas=2)) as cluster,
        exported(cluster.environment() | {"HEADWATER_RANK": "0", "HEADWATER_WORLD_SIZE": "1"}),
        headwater.connect(timeout=PATIENCE) as trainer,
    ):
        table = trainer.dense("lm", (256, 256), optimizer="SGD", lr=1.0)

        def publish(name: str) -> None:
            table.push(torch.ones(256, 256)).wait()
            trainer.publish([table], name).wait(PATIENCE)

        publish("v1")
        with relay() as command:  # which finds the cluster as other commands do
            first = command.taken("v1")
            assert (first["way"], first["nbytes"]) == ("whole", first["version"]["nbytes"])
            with headwater.reader("lm", command.address, timeout=PATIENCE) as reader:
                assert float(reader.lease()["lm"].sum()) == -(256 * 256)
                os.kill(cluster.servers[0].pid, signal.SIGKILL)
                publish("v2")
                command.taken("v2")
                assert reader.wait(after=1).name == "v2"
                with reader.lease() as weights:
                    assert float(weights["lm"].sum()) == -2 * (256 * 256)
            assert command.end() == 0


def test_without_a_cluster_it_says_so() -> None:
    words = [sys.executable, "-m", "headwater", "relay", "--model", "lm", "--upstream", "tcp://127.0.0.1:1"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 1
    assert "Unreachable: nobody answers at tcp://127.0.0.1:1" in ended.stderr
    assert ended.stdout == ""
