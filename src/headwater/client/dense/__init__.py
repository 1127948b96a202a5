"""A dense table at a client: parameters as tensors over flat memory, cut over the shards."""
