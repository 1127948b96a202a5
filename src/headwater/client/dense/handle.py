"""The key-value handle of one dense tensor."""

from __future__ import annotations

import torch

from headwater import interrupts
from headwater.client.dense.memory import check_tensor
from headwater.client.dense.table import DenseTable
from headwater.client.tickets import Ticket
from headwater.errors import NonFiniteGradient
from headwater.wire.tensors import finite


class Dense:
    """Push gradients, pull values. Every push is one step of the table's optimizer and policy."""

    def __init__(self, table: DenseTable, rank: int) -> None:
        self.table = table
        self._parameter = table.spec.parameters[0]
        self._names = [self._parameter.name]
        self._rank = rank
        self.gradient = table.gradients[self._parameter.name]
        """Where gradients leave from, of the table's shape and dtype: ``push(w.gradient)`` copies nothing."""
        self.values = table.values[self._parameter.name]
        """The last pulled values, of the table's shape and dtype; a view, overwritten by the next pull."""

    @interrupts.deferred
    def push(self, grad: torch.Tensor) -> Ticket:
        """Send a gradient of the table's shape and dtype; returns at once, the tensor is free again.

        Raises ``ShapeMismatch``; ``NonFiniteGradient`` for NaN or Inf under the policy "error" (nothing is sent).
        """
        self.table.settle()
        skip = self._load(grad)
        if skip:
            return self.table.step(skip=True)
        return self.table.push_step(self._names, want=False)

    @interrupts.deferred
    def pull(self, out: torch.Tensor | None = None, timeout: float | None = None) -> torch.Tensor:
        """The newest values that the policy allows; into ``out`` (same shape and dtype) or a new tensor."""
        self.table.pull().wait(timeout)
        return self._take(out)

    @interrupts.deferred
    def push_pull(self, grad: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``push`` and ``pull`` in one round trip, overlapped block by block."""
        self.table.settle()
        if self._load(grad):
            self.table.step(skip=True).wait()
        else:
            self.table.push_pull().wait()
        self.table.wait()
        return self._take(out)

    def assign(self, value: torch.Tensor) -> None:
        """Overwrite the values on the servers."""
        self.table.assign({self._parameter.name: value})

    def _load(self, grad: torch.Tensor) -> bool:
        """Put the gradient where it leaves from; True if the step must be skipped."""
        check_tensor(self._parameter, grad)
        policy = self.table.spec.nonfinite
        if policy != "allow" and not finite(grad):
            if policy == "skip":
                return True
            raise NonFiniteGradient(
                f"the gradient of {self._parameter.name!r} from worker {self._rank} holds NaN or Inf; nothing was "
                "sent. Declare the table with nonfinite='skip' or 'allow' if that is meant"
            )
        if grad.data_ptr() != self.gradient.data_ptr():
            self.gradient.copy_(grad.detach())
        elif grad.stride() != self.gradient.stride():  # the same memory, read in another order
            self.gradient.copy_(grad.detach().clone())
        return False

    def _take(self, out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            return self.values.clone()
        check_tensor(self._parameter, out)
        if out.data_ptr() != self.values.data_ptr():
            out.copy_(self.values)
        return out
