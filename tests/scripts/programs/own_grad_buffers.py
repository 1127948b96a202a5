"""One flat gradient buffer of the script's own: every .grad is a view of it, it is zeroed and clipped as a whole."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
flat = torch.zeros(sum(p.numel() for p in model.parameters()))
at = 0
for p in model.parameters():
    p.grad = flat[at : at + p.numel()].view_as(p)
    at += p.numel()
torch.manual_seed(1 + rank)
losses = []
for _ in range(12):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    flat.zero_()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
