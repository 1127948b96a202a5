"""A loop that looks for NaN by itself and skips such steps, on all ranks alike."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for step in range(20):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    if step % 7 == 3:
        loss = loss * float("nan")
    optimizer.zero_grad()
    if not torch.isfinite(loss):
        continue
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
