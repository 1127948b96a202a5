"""``headwater.data.shards``: a torch sampler whose indices come from the coordinator's data plan."""

from __future__ import annotations

import torch

from headwater.integrations.base.data_plan import PlanReader


class ShardSampler(PlanReader, torch.utils.data.Sampler[int]):
    """This worker's share of a data plan, where torch wants a sampler; see ``PlanReader`` for what it does.

    The loop around it ends when every sample of every epoch is done::

        for epoch in sampler.epochs():
            for x, y in loader:
                ...
                opt.step()
                sampler.commit(len(x))
    """
