"""One parameter in a table, as the framework-free half sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from headwater.integrations.base.gradients import Bucket


class TableParameter:
    """A parameter's place in its table, and how far it is in the step under way.

    ``gradient`` and ``values`` are the table's memory: CPU tensors. ``copies``: the parameter has memory of its own (on
    a device, say), so that its gradient is copied into the table at the end of a step, and its values out of it.
    ``fresh``: the step whose values it shows. ``changed``: ``gradient`` holds what was not pushed, or not as it is now;
    whoever writes into ``gradient`` sets it. ``left``: a gradient of this step was pushed. ``stepped``: one was
    of a step whose values are not shown yet.
    """

    __slots__ = (
        "__weakref__",
        "bucket",
        "changed",
        "copies",
        "fresh",
        "gradient",
        "left",
        "name",
        "nbytes",
        "stepped",
        "values",
    )

    bucket: Bucket

    def __init__(self, name: str, gradient: Tensor, values: Tensor, *, copies: bool) -> None:
        self.name = name
        self.gradient = gradient
        self.values = values
        self.nbytes = gradient.nbytes
        self.copies = copies
        self.left = self.changed = self.stepped = False
        self.fresh = 0
