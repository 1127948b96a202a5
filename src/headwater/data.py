"""Which samples a worker trains on: the public helper behind ``headwater.data``.

A plan that the coordinator keeps hands each sample out once per epoch, to as many workers as there are, however they
come and go. See docs/data.md.

    >>> sampler = headwater.data.shards(len(dataset), epochs=3)            # doctest: +SKIP
    >>> loader = DataLoader(dataset, batch_size=32, sampler=sampler)       # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwater.client import Client
    from headwater.integrations.torch_data import ShardSampler


def shards(
    n: int,
    epochs: int = 1,
    seed: int = 0,
    *,
    client: Client | None = None,
    name: str = "data",
    chunk: int | None = None,
    overlap: bool = True,
    lag: int | None = None,
) -> ShardSampler:
    """A ``torch.utils.data.Sampler`` of this worker's share of ``n`` samples.

    Each epoch has a fresh order, the same on every worker. Workers take it chunk by chunk, as fast as each of them is;
    what a worker that dies had not finished goes to the others.

    Args:
        n: samples in the dataset.
        epochs: how often each sample is trained on.
        seed: of the order; a 64-bit number.
        client: from ``headwater.connect``; by default the one that is open in this process when the sampler is first
            used, say the one of ``headwater.Optimizer``.
        name: the plan's; workers with the same name share it. Another run on the same cluster takes another name.
        chunk: samples that are given out at a time, and given out again if their worker dies. None: about 1/256 of an
            epoch, at most 1024. The batch size makes what a dead worker leaves exact (see docs/data.md).
        overlap: the next epoch may begin while others still hold the last chunks of this one. Without it, who is early
            waits.
        lag: for a loop that does not call ``sampler.commit()``: a sample counts as trained on once this many later ones
            have been handed out. At least what the loader fetches ahead: batch_size × (1 + num_workers ×
            prefetch_factor).

    Raises:
        UsageError: numbers that make no plan; when first used, another plan under this name.
    """
    from headwater.integrations.torch_data import ShardSampler

    return ShardSampler(n, epochs, seed, client=client, name=name, chunk=chunk, overlap=overlap, lag=lag)
