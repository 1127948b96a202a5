"""The memory of a shard and the kernels that step it. No I/O: the loop hands tensors in."""

from headwater.server.tables.dense import DenseShard, state_bytes
from headwater.server.tables.plan import Contribution

__all__ = ["Contribution", "DenseShard", "state_bytes"]
