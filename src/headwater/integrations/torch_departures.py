"""Gradients leave during backward: hook → bucket → ``table.push``.

A parameter's gradient moves into the table's memory as soon as autograd has finished it; the memory that
autograd gave it is free then. A bucket of them leaves when its last one is ready.
"""

# ruff: noqa: SLF001 -- torch documents a tensor's version counter as `_version`; it has no other name

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from headwater import interrupts
from headwater.errors import GradientModified, HeadwaterError, NonFiniteGradient, UsageError
from headwater.integrations.torch_leaves import Held, Leaf
from headwater.types import Hyper
from headwater.wire.tensors import finite

Groups = list[dict[str, Hyper]] | None
"""Hyperparameters of all groups if they changed since they were last sent, else None."""

_GAP = 8192
"""Bytes of padding, always zero, that may lie between neighbours in a table: a page and a cache line at most."""


class Bucket:
    """Gradients that leave together. ``missing``: how many are not ready in this step."""

    __slots__ = ("leaves", "missing", "names", "runs")

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = tuple(leaves)
        self.names = tuple(leaf.name for leaf in leaves)
        self.missing = len(self.leaves)
        self.runs = _runs(self.leaves)
        for leaf in self.leaves:
            leaf.bucket = self


class Departures:
    """The way out of one optimizer's gradients."""

    def __init__(
        self,
        held: Held,
        frozen: Mapping[str, torch.nn.Parameter],
        bucket_bytes: int,
        nonfinite: Literal["error", "skip", "allow"],
        groups: Callable[[], Groups],
    ) -> None:
        self.local = False  # inside no_sync(): gradients accumulate and stay
        self.skip = False  # this step holds a gradient that is not finite, and the policy is to skip
        self._held = held
        self._frozen = frozen
        self._bucket_bytes = bucket_bytes
        self._nonfinite = nonfinite
        self._groups = groups
        self._failed: HeadwaterError | None = None
        self._order: list[Leaf] | None = []  # as gradients became ready, until the buckets follow it
        self._buckets = pack(held.leaves[::-1], bucket_bytes)
        self._handles: list[Any] = [
            leaf.parameter.register_post_accumulate_grad_hook(partial(self._ready, leaf))  # type: ignore[no-untyped-call]
            for leaf in held.leaves
        ]

    @property
    def buckets(self) -> list[tuple[str, ...]]:
        """The names in each bucket, in the order in which they are expected to leave."""
        return [bucket.names for bucket in self._buckets]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def finish(self) -> None:
        """End of the step on this worker: check what has left, send what has not.

        A gradient that was set or accumulated without a hook (``no_sync``, by hand) leaves now; a parameter
        without one takes no part in the step.

        Raises:
            GradientModified: a gradient changed after it left; nothing more was sent.
            NonFiniteGradient: as in the hooks.
            UsageError: a parameter that is not in the table has a gradient.
        """
        if self._failed is not None:
            raise self._failed
        self._check()
        for leaf in self._held.leaves:
            if leaf.left != self._held.clock and leaf.parameter.grad is not None:
                self._hand_over(leaf)
        for bucket in self._buckets:
            if bucket.missing:
                self._send([leaf for leaf in bucket.leaves if leaf.left == self._held.clock])

    def next_step(self) -> None:
        """The step was sent off: every gradient is missing again. Follow the observed order, once."""
        self.skip, self._failed = False, None
        for bucket in self._buckets:
            bucket.missing = len(bucket.leaves)
        if self._order:
            seen = {leaf.name for leaf in self._order}
            rest = [leaf for leaf in self._held.leaves[::-1] if leaf.name not in seen]
            self._buckets = pack([*self._order, *rest], self._bucket_bytes)
            self._order = None

    @interrupts.deferred
    def _ready(self, leaf: Leaf, _parameter: torch.Tensor) -> None:
        """Autograd's hook: the gradient of this backward is complete in ``parameter.grad``."""
        if self.local:
            return
        if leaf.left == self._held.clock:
            raise self._fail(
                GradientModified(
                    f"a second backward() before step() reached {leaf.name!r} on rank {self._held.rank}, whose "
                    "gradient had left for the servers; the step can no longer be taken. To accumulate, put all but "
                    f"the last backward() into `with opt.no_sync():`. {_WAY_ON}"
                )
            )
        if self._order is not None:
            self._order.append(leaf)
        self._hand_over(leaf)

    def _hand_over(self, leaf: Leaf) -> None:
        """Move the gradient into the table's memory, and send its bucket if it was the last one missing."""
        held = self._held
        if leaf.fresh != held.clock:
            held.wait([leaf])  # the servers may still read the memory
        grad = leaf.parameter.grad
        if grad is not leaf.gradient:
            try:
                _load(leaf, grad)
            except RuntimeError as error:  # torch refuses a gradient of another dtype or device than the parameter
                raise self._fail(held.moved()) from error
        leaf.version = leaf.grad._version  # type: ignore[union-attr]
        leaf.left = held.clock
        bucket = leaf.bucket
        bucket.missing -= 1
        if not bucket.missing:
            self._send(bucket.leaves)

    def _send(self, leaves: Sequence[Leaf]) -> None:
        if not leaves or not self._checked(leaves):
            return
        whole = leaves is leaves[0].bucket.leaves
        names = leaves[0].bucket.names if whole else [leaf.name for leaf in leaves]
        try:
            self._held.table.push(names, groups=self._groups())
        except HeadwaterError as error:
            self._failed = error  # these never left, so step() must not end the step as if they had
            raise

    def _checked(self, leaves: Sequence[Leaf]) -> bool:
        """Whether the gradients may leave: the policy on NaN and Inf."""
        if self._nonfinite == "allow" or self.skip:
            return not self.skip
        bucket = leaves[0].bucket
        if leaves is bucket.leaves and all(map(finite, bucket.runs)):
            return True
        bad = next((leaf for leaf in leaves if not finite(leaf.gradient)), None)
        if bad is None:
            return True
        if self._nonfinite == "skip":
            self.skip = True
            return False
        raise self._fail(
            NonFiniteGradient(
                f"the gradient of {bad.name!r} on rank {self._held.rank} holds NaN or Inf; it was not sent and the "
                f"step cannot be taken. nonfinite='skip' passes over such steps. {_WAY_ON}"
            )
        )

    def _check(self) -> None:
        clock = self._held.clock
        for leaf in self._held.leaves:
            if leaf.left == clock and leaf.changed():
                raise self._fail(
                    GradientModified(
                        f"the gradient of {leaf.name!r} changed on rank {self._held.rank} after it had left for the "
                        "servers; the step was not taken. Instead of clip_grad_norm_ pass max_grad_norm=… to "
                        "headwater.Optimizer, instead of scaling gradients (GradScaler, /= n) scale the loss, and call "
                        f"zero_grad() after step(). Gradients gathered under opt.no_sync() may be changed. {_WAY_ON}"
                    )
                )
        for name, parameter in self._frozen.items():
            if parameter.requires_grad and parameter.grad is not None:
                raise UsageError(
                    f"parameter {name!r} was frozen when the optimizer was made, so it is not in the table, and now "
                    "has a gradient; the step was not taken. Unfreeze first, or close() and make a new optimizer"
                )

    def _fail(self, error: HeadwaterError) -> HeadwaterError:
        self._failed = error
        return error


_WAY_ON = "To give this step up on all workers and go on, call opt.skip_step()"


def pack(leaves: Sequence[Leaf], limit: int) -> list[Bucket]:
    """Buckets of neighbours, each closed by the leaf that brings it to ``limit`` bytes."""
    buckets, some, size = [], [], 0
    for leaf in leaves:
        some.append(leaf)
        size += leaf.nbytes
        if size >= limit:
            buckets.append(Bucket(some))
            some, size = [], 0
    return [*buckets, Bucket(some)] if some else buckets


def _load(leaf: Leaf, grad: torch.Tensor | None) -> None:
    """Copy a gradient into the table and let the parameter hold that copy, so that the original is freed."""
    if grad is None or grad.layout is not torch.strided:
        raise UsageError(f"the gradient of {leaf.name!r} is sparse; a dense table takes sparse=False embeddings only")
    leaf.gradient.copy_(grad.detach())
    if leaf.copies:
        leaf.grad = grad  # on another device: it stays there, as autograd requires
    else:
        leaf.parameter.grad = leaf.grad = leaf.gradient


def _runs(leaves: Sequence[Leaf]) -> list[torch.Tensor]:
    """The leaves' gradient memory in as few flat tensors as it lies in, to read it in one go.

    A run may cover padding and, where the table's order differs from the bucket's, a small neighbour.
    """
    runs: list[torch.Tensor] = []
    for leaf in sorted(leaves, key=lambda leaf: leaf.gradient.data_ptr()):
        flat = leaf.gradient.detach().view(-1)
        last = runs[-1] if runs else None
        if last is not None and _adjacent(last, flat):
            count = flat.storage_offset() + flat.numel() - last.storage_offset()
            runs[-1] = last.as_strided((count,), (1,), last.storage_offset())
        else:
            runs.append(flat)
    return runs


def _adjacent(first: torch.Tensor, second: torch.Tensor) -> bool:
    gap = second.data_ptr() - first.data_ptr() - first.nbytes
    one_memory = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return one_memory and first.dtype == second.dtype and 0 <= gap < _GAP
