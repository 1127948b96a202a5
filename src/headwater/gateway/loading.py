"""From what a user names to a model that answers: where the files are, which table set the weights follow."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import msgspec

from headwater import pretrained
from headwater.errors import DeadlineExceeded, LinkError, Unreachable, UsageError
from headwater.types import VersionInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from headwater.gateway.engine_types import Source, Weights
    from headwater.gateway.limits import Limits
    from headwater.gateway.served import Model, Served
    from headwater.gateway.tasks import Task

log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds of one question for the first version."""

NOTE = "headwater.json"
"""A file of a model's folder that names its table set: ``{"model": "NAME"}``."""
_TABLES = "model"
"""The table set of a folder without a note: what ``headwater.Optimizer`` calls it by default."""

Dtype = Literal["float32", "bfloat16", "float16"]


class LoadPlan(NamedTuple):
    """What is to be served. ``files``: a folder, a GGUF file or a hub's name; "" if ``module`` makes the model.

    ``tables``: the table set that the weights follow. ``complete``: the model has weights of its own, which are served
    if no cluster runs. ``recipe``: the one that trained the model and answers with it; "": the server knows how.
    """

    name: str
    tables: str
    files: str
    module: str
    complete: bool
    recipe: str = ""


class _Note(msgspec.Struct):
    model: str = _TABLES
    recipe: str = ""


def plan(model: str, *, base: str | None, module: str | None, name: str | None) -> LoadPlan:
    """What ``--model`` means: files, or a table set whose files ``--base`` or ``--module`` name.

    Raises ``UsageError`` if that is not clear; ``DataError`` for a model in a package that is not installed.
    """
    if base and module:
        raise UsageError("--base is for language models and --module for others: give one; nothing was started")
    path = Path(model)
    if model in pretrained.PACKAGED and not path.exists() and not base and not module:
        return LoadPlan(name or model, _TABLES, str(pretrained.packaged(model)), "", complete=True)
    if base in pretrained.PACKAGED and not Path(base).exists():
        base = str(pretrained.packaged(base))
    if path.exists():
        if base:
            raise UsageError(f"--model {model} is a folder of its own, so --base is too much; nothing was started")
        return _plan_of_files(path, module or "", name)
    if base or module:
        if base and Path(base).exists():
            _check_files(Path(base))
        return LoadPlan(name or model, model, base or "", module or "", complete=False)
    if "/" in model and not model.startswith((".", "/", "~")):
        return LoadPlan(name or model, _TABLES, model, "", complete=True)
    raise UsageError(
        f"--model {model}: no folder of that name. If it is a table set, name its files by --base FOLDER, or its "
        "module by --module PACKAGE.MODULE:FACTORY; nothing was started"
    )


def _plan_of_files(path: Path, module: str, name: str | None) -> LoadPlan:
    note = _note_of(path)
    found = LoadPlan(name or _called(path), note.model, "" if module else str(path), module, complete=True)
    if module:
        return found
    if not note.recipe:
        _check_files(path)
        return found
    if not any(path.glob("*.safetensors")):
        raise UsageError(
            f"{path}: a run of {note.recipe!r} without a model yet: none was saved (see --save-every of the training); "
            "nothing was started"
        )
    return found._replace(recipe=note.recipe)


def check_reachable(wanted: LoadPlan) -> None:
    """Raises ``DataError`` if the files are to come from the hub and cannot: at once, not when the server is up."""
    if wanted.files:
        pretrained.on_the_hub(wanted.files)


def _check_files(path: Path) -> None:
    """Raises ``UsageError`` for a folder without a model in it; a look at its files does not need the libraries."""
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"{path}: no config.json there, so it is no folder of a model (name a .gguf file itself; for a module of "
            "your own give --module); nothing was started"
        )
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(f"{path} is a file, and no .gguf: name the folder that it lies in; nothing was started")


def _called(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


def _note_of(path: Path) -> _Note:
    note = path / NOTE
    if not note.is_file():
        return _Note()
    try:
        return msgspec.json.decode(note.read_bytes(), type=_Note)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{note}: {error}; nothing was started") from None


def make_module(factory: str) -> nn.Module:
    """The module that ``package.module:factory`` makes, in evaluation mode. The working directory is searched too.

    Raises ``UsageError``: there is none.
    """
    from torch import nn

    where, _, what = factory.partition(":")
    if not where or not what:
        raise UsageError(f"--module {factory}: say PACKAGE.MODULE:FACTORY; nothing was started")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(where), what)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UsageError(f"--module {factory}: {error}; nothing was started") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"--module {factory} made a {type(made).__name__}, no nn.Module; nothing was started")
    return made.eval().requires_grad_(requires_grad=False)


def load(
    wanted: LoadPlan,
    source: Source,
    limits: Limits,
    *,
    tag: str,
    slots: int,
    dtype: Dtype | None,
    module: nn.Module | None = None,
    recipe: type[Task] | None = None,
) -> Model:
    """The model at the source's version, following it.

    ``module``: what ``make_module`` made, if the plan has one; ``recipe``: what answers with the plan's recipe's model.

    Raises ``UsageError``: the files cannot be loaded; ``ShapeMismatch``: the version is of another model.
    """
    import torch

    kind: torch.dtype | None = getattr(torch, dtype) if dtype else None
    if module is not None:
        return _predictor(module, source, limits, tag, kind)
    folder = Path(wanted.files)
    if recipe is not None:
        check_run(wanted, source.wait(-1, tag, _PATIENCE))
        return _task_model(recipe, folder, source, limits, tag)
    if (folder / "modules.json").is_file():
        return _encoder(folder, source, limits, tag, kind)
    from headwater.gateway import hf
    from headwater.gateway.engine import Engine

    files = hf.load(wanted.files, dtype=kind)
    return Engine(files, source, slots=slots, queue=limits.queue, tag=tag, dtype=kind)


def _predictor(module: nn.Module, source: Source, limits: Limits, tag: str, dtype: torch.dtype | None) -> Model:
    from headwater.gateway.live import Live
    from headwater.gateway.predict import ModulePredictor

    return ModulePredictor(Live(module, source, tag=tag, dtype=dtype, threads=limits.threads))


def check_run(wanted: LoadPlan, version: VersionInfo) -> None:
    """Whether a cluster's version is of the run that is served; its trainer has said which it is of.

    Another run of the same recipe fits as well, and answers otherwise: the log warns, as folders may be renamed.

    Raises ``UsageError``: it is of another recipe.
    """
    run, recipe = version.metadata.get("run"), version.metadata.get("recipe", wanted.recipe)
    here = Path(wanted.files).resolve().name
    if recipe != wanted.recipe:
        raise UsageError(
            f"the cluster has versions of the run {run!r} of recipe {recipe!r}, and {here!r} is of {wanted.recipe!r}; "
            "give the --address of its own cluster, or --static; nothing is served"
        )
    if run not in (None, here):
        log.warning("the cluster's versions are of the run %r and not of %r: they answer, not the folder's", run, here)


def _task_model(recipe: type[Task], folder: Path, source: Source, limits: Limits, tag: str) -> Model:
    """It computes in the dtype that it was trained in: its recipe makes the inputs."""
    from headwater.gateway.live import Live
    from headwater.gateway.tasks import TaskModel

    module, answers = recipe.read(folder)
    module.eval().requires_grad_(requires_grad=False)
    return TaskModel(Live(module, source, tag=tag, threads=limits.threads), answers)


def _encoder(folder: Path, source: Source, limits: Limits, tag: str, dtype: torch.dtype | None) -> Model:
    from headwater.gateway import sentence
    from headwater.gateway.live import Live

    recipe = sentence.read_recipe(folder)
    module, tokenizer = sentence.load(folder)
    live = Live(module, source, tag=tag, dtype=dtype, threads=limits.threads)
    return sentence.SentenceEncoder(live, tokenizer, recipe)


def step_of(wanted: LoadPlan) -> int | None:
    """The step of a recipe's model as it lies in its run's folder; None: the files do not say."""
    if not wanted.recipe:
        return None
    saved = (path.name for path in Path(wanted.files).glob("checkpoints/*"))
    return max((int(name) for name in saved if name.isdecimal()), default=None)


class _Unchanged(Mapping[str, "Tensor"]):
    """Weights without tensors: the model's own values."""

    def __init__(self, version: VersionInfo) -> None:
        self.version = version

    def __getitem__(self, name: str) -> Tensor:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def release(self) -> None:
        """Nothing is held."""


class Still:
    """A source for a model that is just served: its own values are the only version, number 0.

    It is called ``static``; of a run that saved at ``step``, as the run's versions are: ``step-400``.
    """

    def __init__(self, name: str, step: int | None = None) -> None:
        called = "static" if step is None else f"step-{step}"
        self._version = VersionInfo(name, 0, called, 0, step or 0, time.time(), (), 0, "")
        self._closed = threading.Event()

    def lease(self, name: str = "latest") -> Weights:
        del name
        return _Unchanged(self._version)

    def wait(self, after: VersionInfo | int, name: str = "latest", timeout: float = 30.0) -> VersionInfo:
        del name
        if after not in (self._version, self._version.number):
            return self._version
        self._closed.wait(timeout)
        raise DeadlineExceeded("a static model has no other version")

    def close(self) -> None:
        self._closed.set()


class _Seen(Protocol):
    @property
    def connected(self) -> bool: ...
    @property
    def error(self) -> str: ...


class _Reader(Protocol):
    def lease(self, name: str = ...) -> Weights: ...
    def wait(self, after: VersionInfo | int = ..., name: str = ..., timeout: float | None = ...) -> VersionInfo: ...
    def statistics(self) -> _Seen: ...
    def close(self) -> None: ...


class FromReader:
    """``headwater.reader`` as a source that tells silence from news that do not come."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def lease(self, name: str = "latest") -> Weights:
        return self._reader.lease(name)

    def wait(self, after: VersionInfo | int, name: str = "latest", timeout: float = 30.0) -> VersionInfo:
        """As the reader's; ``Unreachable`` instead of ``DeadlineExceeded`` if nobody answered meanwhile."""
        try:
            return self._reader.wait(after, name, timeout)
        except DeadlineExceeded:
            seen = self._reader.statistics()
            if not seen.connected:
                raise Unreachable(f"the cluster does not answer: {seen.error}") from None
            raise

    def close(self) -> None:
        self._reader.close()


def wait_for_first(source: Source, tag: str, served: Served) -> bool:
    """Until the source has a version under the tag. False: the server ends before."""
    said = ""
    while not served.closing:
        try:
            source.wait(-1, tag, _PATIENCE)
        except DeadlineExceeded:
            news = f"{served.name} has no version {tag!r} yet; it is waited for"
        except LinkError as error:
            news = f"{error}; the first version of {served.name} is waited for"
            time.sleep(_PATIENCE)
        else:
            return True
        if news != said:
            said = news
            log.info("%s", news)
    return False
