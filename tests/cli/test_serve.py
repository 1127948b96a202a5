"""``headwater serve``: what its options mean, and a cluster followed from the first version to the cluster's end."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

import headwater
from headwater.cli.serve import check_origins, parse_size
from headwater.errors import UsageError
from headwater.gateway.loading import LoadPlan, check_run, make_module, plan
from headwater.launch import Launcher
from headwater.types import VersionInfo
from tests.patience import PATIENCE

Command = Callable[..., Any]


TOY = """
from torch import nn

def make():
    return nn.Linear(2, 1, bias=False)

def wrong():
    return 5
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with a module's code in it."""
    (tmp_path / "toy_of_the_test.py").write_text(TOY, encoding="utf-8")
    return tmp_path


def test_what_model_means(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").touch()
    found = plan(str(run), base=None, module=None, name=None)
    assert found == LoadPlan("run", "model", str(run), "", complete=True)
    (run / "headwater.json").write_text('{"model": "lm", "other": 1}', encoding="utf-8")
    assert plan(str(run), base=None, module=None, name="mine") == LoadPlan("mine", "lm", str(run), "", complete=True)
    assert plan(str(run), base=None, module="a:b", name=None) == LoadPlan("run", "lm", "", "a:b", complete=True)
    assert plan("lm", base=str(run), module=None, name=None) == LoadPlan("lm", "lm", str(run), "", complete=False)
    assert plan("lm", base=None, module="a:b", name=None) == LoadPlan("lm", "lm", "", "a:b", complete=False)
    with pytest.raises(UsageError, match="name the folder that it lies in"):
        plan(str(run / "config.json"), base=None, module=None, name=None)
    with pytest.raises(UsageError, match="name the folder that it lies in"):
        plan("lm", base=str(run / "config.json"), module=None, name=None)
    hub = plan("someone/something", base=None, module=None, name=None)
    assert hub == LoadPlan("someone/something", "model", "someone/something", "", complete=True)
    for given in ({"base": None, "module": None}, {"base": "x", "module": "a:b"}):
        with pytest.raises(UsageError, match="nothing was started"):
            plan("lm", name=None, **given)
    with pytest.raises(UsageError, match="--base is too much"):
        plan(str(run), base="x", module=None, name=None)
    (run / "headwater.json").write_text("[", encoding="utf-8")
    with pytest.raises(UsageError, match=r"headwater\.json"):
        plan(str(run), base=None, module=None, name=None)


def test_a_version_of_another_run_is_said_and_one_of_another_recipe_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = LoadPlan("mine", "model", str(tmp_path / "mine"), "", complete=True, recipe="image")

    def version(**said: str) -> VersionInfo:
        return VersionInfo("model", 1, "step-1", 0, 1, 0.0, (), 0, "", said)

    check_run(wanted, version())
    check_run(wanted, version(run="mine", recipe="image"))
    assert not caplog.records
    check_run(wanted, version(run="other", recipe="image"))
    assert "the cluster's versions are of the run 'other' and not of 'mine'" in caplog.text
    with pytest.raises(UsageError, match="versions of the run 'mine' of recipe 'faces'"):
        check_run(wanted, version(run="mine", recipe="faces"))


@pytest.mark.parametrize(("text", "size"), [("1MiB", 1 << 20), ("500 kB", 500_000), ("64", 64), ("2GiB", 1 << 31)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5MiB", "MiB", "1 mile"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--max-body"):
        parse_size(text)


@pytest.mark.parametrize("origin", ["*", "https://chat.example", "http://127.0.0.1:3000", "http://[::1]:80"])
def test_origins(origin: str) -> None:
    assert check_origins([origin]) == [origin]


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/", "https://Chat.example", "", "http://a,http://b"]
)
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    with pytest.raises(UsageError, match="--cors"):
        check_origins(["*", origin])


def test_a_module_is_made_by_its_factory(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy)
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = make_module("toy_of_the_test:make")
    assert not made.training
    for wrong in ("toy_of_the_test:wrong", "toy_of_the_test:none", "no_such_module:make", "toy_of_the_test"):
        with pytest.raises(UsageError, match="nothing was started"):
            make_module(wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere"], "UsageError: --model nowhere: no folder of that name"),
        (["--model", "."], "no config.json there"),
        (["--model", "lm", "--base", "."], "no config.json there"),
        (["--model", "a/b", "--host", "0.0.0.0"], "--api-keys FILE"),
        (["--model", "a/b", "--max-body", "much"], "--max-body much"),
        (["--model", "a/b", "--api-keys", "keys"], "chmod 600"),
        (["--model", "a/b", "--api-keys", "none"], "cannot be read"),
        (["--model", "lm", "--base", "a/b"], "no cluster of yours runs here"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    headwater_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("sk-1", encoding="utf-8")
    (tmp_path / "keys").chmod(0o644)
    answer = headwater_command("serve", "--port", "0", *words)
    assert answer.code == 1
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1
    assert answer.out == ""


class Served:
    """``headwater serve`` as another process."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        command = [sys.executable, "-m", "headwater", "serve", "--port", "0", *words]
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert self.process.stdout
        self.banner = ""
        while "to end" not in self.banner:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            self.banner += line
        self.url = next(word for word in self.banner.split() if word.startswith("http")).removesuffix("/v1")

    def ask(self, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        content = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, content, {"content-type": "application/json"})
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, {k.lower(): v for k, v in answer.headers.items()}, json.loads(answer.read())
        except HTTPError as error:
            with error:
                return error.code, {k.lower(): v for k, v in error.headers.items()}, json.loads(error.read())

    def until(self, path: str, holds: Callable[[int, dict[str, str]], bool], body: Any = None) -> Any:
        tick = threading.Event()
        for _ in range(int(PATIENCE / 0.05)):
            status, headers, said = self.ask(path, body)
            if holds(status, headers):
                return said
            tick.wait(0.05)
        raise AssertionError((status, headers, said))

    def end(self) -> tuple[str, str]:
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=PATIENCE)


@pytest.fixture
def serve(toy: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(*words: str, **environment: str) -> Served:
        made.append(Served(toy, *words, **environment))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.communicate()


def test_a_module_of_ones_own_without_a_cluster(serve: Callable[..., Served]) -> None:
    server = serve("--model", ".", "--name", "toy", "--module", "toy_of_the_test:make")
    assert "the model's own" in server.banner
    server.until("/readyz", lambda status, _: status == 200)
    status, headers, said = server.ask("/v1/predict", {"inputs": [{"data": [[1, 2], [3, 4]]}]})
    assert (status, headers["x-headwater-version"], said["model"]) == (200, "static", "toy")
    assert said["outputs"]["output"]["shape"] == [2, 1]
    out, err = server.end()
    assert server.process.returncode == 0
    assert out == "The server has ended.\n"
    ready, line = err.splitlines()
    assert "ready with version static (number 0, step 0)" in ready
    assert "127.0.0.1 POST /v1/predict 200 " in line
    assert line.endswith(" static#0")


@pytest.fixture
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets up loggers of its process, which here is the tests'."""
    for name in ("headwater", "uvicorn"):
        logger = logging.getLogger(name)
        for attribute in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, attribute, getattr(logger, attribute))
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")


@pytest.mark.usefixtures("_own_logging")
def test_files_that_cannot_be_loaded_end_the_command(
    headwater_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "modules.json"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    answer = headwater_command("serve", "--model", ".", "--static", "--port", "0")
    assert answer.code == 1
    assert "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith("headwater: UsageError: modules.json:")
    assert "has ended" not in answer.out


@pytest.mark.parametrize(("kept", "said"), [({}, "GOMP_SPINCOUNT = '0'"), ({"GOMP_SPINCOUNT": "77"}, "'77'")])
def test_threads_that_wait_sleep(kept: dict[str, str], said: str) -> None:
    """The library of OpenMP says what it was told when it was loaded, and the user's own settings stay."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-m", "headwater", "serve", "--model", "x", "--module", "no_such_module:make"]
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **kept}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr


def test_a_cluster_is_followed(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ready, the first version, the next one, and the last one for as long as the cluster is gone."""
    wanted = {"inputs": [{"data": [1, 1]}]}
    with Launcher(1) as job:
        for name in ("HEADWATER_ADDRESS", "HEADWATER_TOKEN"):
            monkeypatch.setenv(name, job.environment()[name])
        server = serve("--model", "toy", "--module", "toy_of_the_test:make")
        assert f"'latest' of table set 'toy' at {job.address}" in server.banner
        assert job.environment()["HEADWATER_TOKEN"] not in server.banner
        status, headers, said = server.ask("/v1/predict", wanted)
        assert (status, said["error"]["code"], headers["retry-after"]) == (503, "loading", "1")

        model = torch.nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        optimizer = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, name="toy")
        optimizer.publish("first").wait()
        server.until("/readyz", lambda status, _: status == 200)
        status, headers, said = server.ask("/v1/predict", wanted)
        assert (status, headers["x-headwater-version"], headers["x-headwater-version-step"]) == (200, "first", "0")
        assert said["outputs"]["output"]["data"] == [3.0]

        model(torch.ones(2)).sum().backward()
        optimizer.step()
        optimizer.publish("second").wait()
        server.until("/v1/models", lambda _, headers: headers["x-headwater-version"] == "second")
        status, headers, said = server.ask("/v1/predict", wanted)
        assert (said["outputs"]["output"]["data"], headers["x-headwater-version-step"]) == ([1.0], "1")
        assert "x-headwater-stale" not in headers
        optimizer.close()
    server.until("/v1/models", lambda _, headers: "x-headwater-stale" in headers)
    status, headers, said = server.ask("/v1/predict", wanted)
    assert (status, said["outputs"]["output"]["data"], headers["x-headwater-version"]) == (200, [1.0], "second")
    _, err = server.end()
    assert server.process.returncode == 0
    assert "Traceback" not in err
    assert "the last one goes on being served" in err
