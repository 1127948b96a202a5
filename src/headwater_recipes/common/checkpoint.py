"""The run folder: what training leaves, what a run goes on from.

    model.safetensors, config.json, …    what the ecosystem loads: the newest checkpoint's model
    checkpoints/00000400/                model, optimizer state and trainer.json of one step
    headwater.json                       which table set readers of the run follow
    …                                    the data as the recipe prepared it
    metrics.jsonl, loss.png, report.json what is known of it

A checkpoint appears by the rename of a whole folder, so it is there entirely or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors.torch import load_file, save_file

from headwater.errors import DataError, DiskFull
from headwater_recipes.common import claim
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.settings import AnySettings, State, Training

AnyModel = TypeVar("AnyModel", bound=torch.nn.Module)
AnyStruct = TypeVar("AnyStruct", bound=msgspec.Struct)

_KEEP = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

TABLE = "model"
"""The table set that a run trains."""


def free(folder: Path | None) -> bool:
    """Whether a new run can have the folder."""
    if folder is None or not folder.exists():
        return True
    return folder.is_dir() and all(path.name == claim.LOCK for path in folder.iterdir())


def new_folder(kind: str, asked: Path | None, now: float | None = None) -> Path:
    """Make the folder of a new run and claim it: the one asked for, or ``runs/<kind>-<date>-<time>``.

    Raises:
        DataError: it exists and holds something. RunInUse: another process makes a run of it.
    """
    try:
        if asked is None:
            folder = _unique(Path("runs"), f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}")
        else:
            folder = asked
            _check_free(folder)
            folder.mkdir(parents=True, exist_ok=True)
        claim.claim(folder)
        _check_free(folder)  # another may have begun, and ended, in between
    except OSError as error:
        place = asked or "runs/"
        raise DataError(f"--run {place}: {error.strerror or error}. Nothing was started; name another.") from error
    return folder


def _unique(parent: Path, name: str) -> Path:
    """Of two that make a folder in the same second each gets one of its own."""
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("there is always another number")


def _check_free(folder: Path) -> None:
    if not free(folder):
        claim.release(folder)
        raise DataError(
            f"--run {folder}: it exists and is not empty. Nothing was changed; go on with it by --resume, or name "
            f"another folder."
        )


@contextlib.contextmanager
def making(kind: str, asked: Path | None) -> Iterator[Path]:
    """``new_folder``, and if the block raises, or SIGTERM or SIGHUP ends it, nothing of it is left.

    Raises ``DiskFull`` if there was no room for what the block wrote.
    """
    there = asked is not None and asked.exists()
    folder = new_folder(kind, asked)
    try:
        with _signals_raise():
            yield folder
    except BaseException as error:
        for path in folder.iterdir() if there else [folder]:
            _remove(path)
        claim.release(folder)
        if full(error):
            raise DiskFull(f"{folder}: {error}; the run was not begun, and nothing is left of it. Make room") from None
        raise


def begin(recipe: Recipe[Any], folder: Path, settings: Training) -> None:
    """Say in a run's folder what is to be done in it, which table set readers of the run follow, and whose recipe
    answers with its model, if one does.
    """
    served = {"recipe": recipe.name} if recipe.served else {}
    write_json(folder / "headwater.json", {"model": TABLE, **served})
    write_json(folder / "trainer.json", State(seed=settings.seed, settings=settings))


def find_folder(recipe: Recipe[Any], asked: Path | None, *, begun: bool = False) -> Path:
    """The folder of a run there is: the one asked for, or the recipe's newest in ``runs/``.

    Args:
        begun: a run without a checkpoint yet will do.

    Raises:
        DataError: there is none with a trained model in it.
    """

    def good(folder: Path) -> bool:
        return newest(folder) is not None or (begun and (folder / "trainer.json").is_file())

    if asked is None:
        found = sorted(path for path in Path("runs").glob(f"{recipe.name}-*") if good(path))
        if not found:
            raise DataError(f"runs/ holds no run of a model; train one ({recipe.typed}) or give --run DIR")
        return found[-1]
    if not good(asked):
        raise DataError(f"--run {asked}: no checkpoint of a trained model there; check the path")
    return asked


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = sorted(path for path in folder.glob("checkpoints/*") if path.name.isdigit())
    return found[-1] if found else None


def read_state(checkpoint: Path, settings: type[AnySettings]) -> State[AnySettings]:
    """Raises ``DataError`` if ``trainer.json`` is missing or damaged."""
    path = checkpoint / "trainer.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=State[settings])  # type: ignore[valid-type]
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path}: {error}. The run cannot go on from this checkpoint.") from error


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP become ``SystemExit``, as Ctrl-C is an exception (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, signal.SIGHUP]
    before = {n: signal.signal(n, leave) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value's JSON, atomically."""
    replace(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def replace(path: Path, data: bytes) -> None:
    """Replace a file, atomically.

    Raises ``DiskFull`` if there is no room for it; it is as it was then, and nothing else is left.
    """
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        _remove(beside)
        if full(error):
            raise DiskFull(f"{path}: {error.strerror}; it is as it was. Make room") from None
        raise


def full(error: BaseException) -> bool:
    """Whether it says that a disk, a quota or a limit is full. Rust libraries say so in words."""
    if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL):
        return True
    return re.search(rf"\(os error ({'|'.join(map(str, _FULL))})\)", str(error)) is not None


def sweep(folder: Path) -> None:
    """Remove what a process that was killed, or ran out of room, has half written. The folder must be claimed."""
    halves = [*folder.glob("checkpoints/*.new"), *folder.glob(".*.new"), *folder.glob("*.json*.new")]
    for path in halves:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_model(model: Any, folder: Path) -> None:
    """Write a model: its library's way if that has one (``save_pretrained``), else ``model.safetensors``."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    # Copies: parameters may be views of one memory, which safetensors takes for tensors that are tied.
    values = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(values, folder / "model.safetensors")


def load_model(model: AnyModel, folder: Path) -> AnyModel:
    """Put the values of ``model.safetensors`` into a model. Raises ``DataError``: missing, damaged or another's."""
    with _readable(folder):
        model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Errors of files that are missing, damaged or another model's are ``DataError``."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError | RuntimeError | msgspec.MsgspecError)
        if not known and type(error).__name__ != "SafetensorError":
            raise
        raise DataError(f"{folder}: the model cannot be read ({error})") from error


def write_network(model: torch.nn.Module, settings: msgspec.Struct, folder: Path) -> None:
    """``model.safetensors``, and ``config.json``: all that a program needs to make the network."""
    values = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")


def read_network(make: Callable[[AnyStruct], AnyModel], kind: type[AnyStruct], folder: Path) -> AnyModel:
    """What ``write_network`` wrote. Raises ``DataError``: a file is missing, damaged or of another network."""
    with _readable(folder):
        model = make(msgspec.json.decode((folder / "config.json").read_bytes(), type=kind))
    return load_model(model, folder)


def save(
    folder: Path,
    model: Any,
    optimizer: Mapping[str, Any],
    state: State[Any],
    write: Callable[[Any, Path], None] = write_model,
) -> Path:
    """Write a checkpoint and make its model the run's.

    Args:
        folder: the run's.
        model: a torch module.
        optimizer: a torch optimizer's ``state_dict()``.
        state: what ``trainer.json`` says.
        write: writes the model's part into a folder.

    Raises ``DiskFull`` if there is no room for it; nothing is left of the attempt then, and the checkpoints before it
    are as they were.
    """
    final = folder / "checkpoints" / f"{state.step:08d}"
    beside = final.with_name(f"{final.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        write(model, beside)
        tensors, rest = _flatten(optimizer)
        save_file(tensors, beside / "optimizer.safetensors")
        write_json(beside / "optimizer.json", rest)
        write_json(beside / "trainer.json", state)
        _flush(beside)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _publish(final, folder)
    except BaseException as error:
        for half in (beside, *folder.glob(".*.new")):
            _remove(half)
        if full(error):
            before = newest(folder)
            there = f"the newest checkpoint is that of step {int(before.name)}" if before else "there is none before it"
            raise DiskFull(f"{final}: no room to write it ({error}); nothing is left of it, and {there}") from None
        raise
    for old in sorted(path for path in final.parent.iterdir() if path.name.isdigit())[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _publish(checkpoint: Path, folder: Path) -> None:
    """The checkpoint's model becomes the run's: the same file under a second name where the disk can do that."""
    for source in checkpoint.iterdir():
        if source.name.startswith(("optimizer.", "trainer.")):
            continue
        beside = folder / f".{source.name}.new"
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
        beside.replace(folder / source.name)


def load_optimizer(checkpoint: Path) -> dict[str, Any]:
    """The ``state_dict()`` that ``save`` was given.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        tensors = load_file(checkpoint / "optimizer.safetensors")
        rest = msgspec.json.decode((checkpoint / "optimizer.json").read_bytes())
    except Exception as error:
        if not isinstance(error, OSError | ValueError | RuntimeError) and type(error).__name__ != "SafetensorError":
            raise
        raise DataError(f"{checkpoint}: the optimizer's state cannot be read ({error})") from error
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, slot = key.partition(".")
        state.setdefault(int(index), {})[slot] = tensor
    return {"state": state, "param_groups": [_group(group) for group in rest["param_groups"]]}


def _flatten(optimizer: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        f"{index}.{slot}": torch.as_tensor(value).detach().clone().contiguous()
        for index, slots in optimizer["state"].items()
        for slot, value in slots.items()
    }
    return tensors, {"param_groups": optimizer["param_groups"]}


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples: ``betas`` becomes one again."""
    return {name: tuple(value) if name == "betas" else value for name, value in group.items()}
