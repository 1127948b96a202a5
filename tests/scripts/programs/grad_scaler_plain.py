"""A GradScaler without unscale_: scaler.step() unscales by itself, on a module in half precision."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    x = torch.randn(16, 10)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    scaler.scale(loss).backward()
    #: mean optimizer
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    losses.append(loss.item())
