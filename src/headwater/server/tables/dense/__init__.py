"""Dense tables on one shard: the memory of the values, optimizer state and the kernels that step it. No I/O."""

from headwater.server.tables.dense.shard import DenseShard, state_bytes

__all__ = ["DenseShard", "state_bytes"]
