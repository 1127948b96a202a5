"""PyTorch: ``headwater.Optimizer``, ``headwater.wrap``, ``headwater.shard`` and the samplers of ``headwater.data``."""
