"""Each rank uses other layers: what a rank did not use counts as zero, as under DDP with find_unused_parameters."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
experts = nn.ModuleList([nn.Linear(6, 1) for _ in range(4)])
optimizer = torch.optim.SGD(experts.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(experts, torch.optim.SGD, lr=0.02, momentum=0.9)
torch.manual_seed(1 + rank)
losses = []
for step in range(24):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(experts[(step + rank) % 3](x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
