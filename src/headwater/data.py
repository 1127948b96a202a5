"""Which samples a worker trains on: the public helper behind ``headwater.data``.

A plan that the coordinator keeps hands each sample out once per epoch, to as many workers as there are, however they
come and go. See docs/data.md.

    >>> sampler = headwater.data.shards(len(dataset), epochs=3)            # doctest: +SKIP
    >>> loader = DataLoader(dataset, batch_size=32, sampler=sampler)       # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from headwater.client import Client
    from headwater.integrations.torch.sampler import ShardSampler

Loader = TypeVar("Loader", bound="DataLoader[Any]")


def shard(loader: Loader, *, client: Client | None = None) -> Loader:
    """This worker's share of a torch ``DataLoader``, also as ``headwater.shard``: the line after the loader is made.

        >>> loader = headwater.shard(DataLoader(dataset, batch_size=32, shuffle=True))   # doctest: +SKIP

    All workers walk through one order, which is that of one process, and worker r of W takes batches r, r + W, …: W
    workers train on what one process does that accumulates W batches to a step. Each sample comes once per epoch, over
    all workers, and every worker has the same number of batches: of an incomplete last round each gets an equal part,
    the first ones a sample more. If that is fewer samples than workers, the first workers get one each with their last
    batch; with ``drop_last`` the round is dropped.

    Samplers, batch samplers, generators, ``set_epoch``, loading processes and the rest of the loader stay as they are.
    Before an epoch that is drawn workers meet and take over what the lowest rank's sampler draws, so every worker must
    iterate; nobody's seed changes. Of an ``IterableDataset`` every worker reads the whole stream, which must be the
    same on all, and keeps its share. Batches that it makes itself (``batch_size=None``) are not cut: some workers may
    have one more.

    Args:
        loader: of one process. One whose sampler shares already (``DistributedSampler``, ``headwater.data.shards``)
            is returned as it is, with a warning; so is any loader where there is one worker.
        client: from ``headwater.connect``; by default the one that is open in this process when the loader is iterated
            over, or else what ``HEADWATER_RANK`` and ``HEADWATER_WORLD_SIZE`` say; then the order is that of seed 0.

    Raises:
        UsageError: not a DataLoader.
        DataError: when the next epoch begins, if workers went through the last one in different orders.
    """
    from headwater.integrations.torch.loader import share

    return share(loader, client)


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
    from headwater.integrations.torch.sampler import ShardSampler

    return ShardSampler(n, epochs, seed, client=client, name=name, chunk=chunk, overlap=overlap, lag=lag)
