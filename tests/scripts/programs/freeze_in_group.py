"""All parameters are given, some frozen; they are thawed later, and others are frozen meanwhile."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 1))
model[0].requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)  #> headwater.Optimizer(model, torch.optim.AdamW, model.parameters(), lr=5e-3)
torch.manual_seed(1 + rank)
losses = []
for step in range(24):
    if step == 8:
        model[0].requires_grad_(True)
    if step == 16:
        model[2].requires_grad_(False)
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
