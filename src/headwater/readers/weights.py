"""The tensors of one version."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwater.errors import ShapeMismatch, UsageError
from headwater.readers.copying import Move, copy_all
from headwater.types import ParameterSpec, VersionInfo
from headwater.wire.tensors import DTYPES

if TYPE_CHECKING:
    from headwater.readers.stored import Mapped, Stored, StoredTable


class Weights(Mapping[str, torch.Tensor]):
    """All tensors of one version by name: parameters and buffers, as the trainer's module names them.

    Tensors are views of memory that all readers of this host share, made when they are asked for; nothing is copied.
    Treat them as read-only: a stray write is seen in this process alone. They stay whole and unchanged as long as they
    are referred to, whatever becomes of the lease, of the version and of the servers.

    A context manager; iterating ``items()`` gives the (name, tensor) pairs that inference engines take.
    """

    def __init__(self, stored: Stored, release: Callable[[], None], forget: Callable[[], None]) -> None:
        # release: ends the lease now; forget: soon, from whatever thread the garbage collector runs in
        self.version: VersionInfo = stored.info
        self._release = release
        self._dropped = weakref.finalize(self, forget)
        self._dropped.atexit = False
        self._stored: Stored | None = stored
        self._tables: tuple[StoredTable, ...] = stored.tables

    def _place(self, name: str) -> tuple[Mapped, int, ParameterSpec]:
        """Where a tensor is, found in what all versions of its table share. Raises ``KeyError``."""
        for table in self._tables:
            found = table.plan.tensors.get(name)
            if found is not None:
                return table.mapped, *found
        self._check_open()  # another thread may have ended it meanwhile
        raise KeyError(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        self._check_open()
        mapped, at, parameter = self._place(name)
        mapped.ensure(at, at + parameter.nbytes)
        dtype = DTYPES[parameter.dtype]
        if not parameter.numel:
            return torch.empty(parameter.shape, dtype=dtype, device="cpu")
        flat = torch.frombuffer(mapped.buffer, dtype=dtype, count=parameter.numel, offset=at)
        return flat.view(parameter.shape)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(table.plan.tensors for table in self._tables)

    def __len__(self) -> int:
        return sum(len(table.plan.tensors) for table in self._tables)

    def __contains__(self, name: object) -> bool:
        return any(name in table.plan.tensors for table in self._tables)

    def state_dict(self, *, copy: bool = False) -> dict[str, torch.Tensor]:
        """All tensors by name; with ``copy`` in memory of their own, else as views."""
        if not copy:
            return dict(self)
        own = {name: torch.empty(p.shape, dtype=DTYPES[p.dtype], device="cpu") for name, p in self.shapes().items()}
        self.copy_to(own)
        return own

    def copy_to(self, target: torch.nn.Module | Mapping[str, torch.Tensor]) -> None:
        """Copy the values into a module's parameters and buffers, or into tensors by name.

        By ``torch.get_num_threads()`` threads, as torch's own operations.

        Raises ``ShapeMismatch`` before anything is written, if a tensor is missing or has another shape; ``UsageError``
        if the lease has ended.
        """
        self._check_open()
        into = module_tensors(target) if isinstance(target, torch.nn.Module) else target
        check(self.shapes(), into, self.version)
        with torch.no_grad():
            moves = [move for name in self for move in self._moves(name, into[name])]
            copy_all(moves, torch.get_num_threads())

    def _moves(self, name: str, into: torch.Tensor) -> Iterator[Move]:
        """The copies to do for a tensor. One that takes more than copying is done here."""
        mapped, at, parameter = self._place(name)
        plain = into.device.type == "cpu" and into.dtype == DTYPES[parameter.dtype] and into.is_contiguous()
        if not plain or not parameter.numel:
            into.copy_(self[name])
            return
        flat = into.detach().view(-1).view(torch.uint8)
        flat[:0].zero_()  # so that autograd, whose count of changes they share, knows of this one
        target = flat.numpy()
        for start, source, where, size in mapped.pieces(at, at + parameter.nbytes):
            yield Move(target[start : start + size], np.frombuffer(source, np.uint8, size, where), mapped)

    def touch(self) -> None:
        """Find all pages now: whoever reads the tensors first does not wait for the kernel to find them one by one.

        Costs about 0.1 ms per MB, and nothing is copied.
        """
        self._check_open()
        for table in self._tables:
            table.mapped.touch()

    def _check_open(self) -> None:
        if self._stored is None:
            raise UsageError(f"the lease of version {self.version.name!r} has ended; tensors taken before stay valid")

    def shapes(self) -> dict[str, ParameterSpec]:
        """Name, shape and dtype of every tensor, without touching one."""
        return {name: parameter for table in self._tables for name, (_, parameter) in table.plan.tensors.items()}

    def release(self) -> None:
        """End the lease: the version may be retired. Tensors taken before stay valid. Calling it again is harmless."""
        if self._dropped.detach() is not None:  # once, whatever the number of threads
            self._stored, self._tables = None, ()
            self._release()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and persistent buffers by name; one that is tied stands under each of its names."""
    return {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}


def check(wanted: Mapping[str, ParameterSpec], into: Mapping[str, torch.Tensor], version: VersionInfo) -> None:
    """Whether tensors can take a version's values. Raises ``ShapeMismatch`` naming the first that cannot."""
    for name, parameter in wanted.items():
        found = into.get(name)
        if found is None:
            raise ShapeMismatch(
                f"version {version.name!r} of {version.model!r} holds {name!r}, which this model does not have; "
                f"nothing was changed. It has {', '.join(sorted(into)[:4])}, …: is it the one that was trained?"
            )
        if tuple(found.shape) != parameter.shape:
            raise ShapeMismatch(
                f"{name!r} has shape {tuple(found.shape)} here and {parameter.shape} in version {version.name!r} of "
                f"{version.model!r}; nothing was changed"
            )
