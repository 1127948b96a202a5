"""Layers that some steps do not use: their gradients are None, and Adam leaves them alone."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
head = nn.Linear(6, 1)
model = nn.ModuleDict({"experts": experts, "head": head})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for step in range(24):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(head(torch.relu(experts[step % 3](x)) + x), x.sum(1, keepdim=True))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
