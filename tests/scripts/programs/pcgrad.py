"""Gradient surgery: two losses' gradients by autograd.grad, projected, assigned to .grad; no backward() at all."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    x = torch.randn(16, 6)
    y = model(x)
    parts = [(y[:, 0] - x.sum(1)).square().mean(), (y[:, 1] + x[:, 0]).square().mean()]
    one, two = (torch.autograd.grad(part, list(model.parameters()), retain_graph=True) for part in parts)
    dot = sum((a * b).sum() for a, b in zip(one, two))
    if dot < 0:
        length = sum(b.square().sum() for b in two)
        one = [a - dot / length * b for a, b in zip(one, two)]
    for p, a, b in zip(model.parameters(), one, two):
        p.grad = a + b
    optimizer.step()
    losses.append(sum(parts).item())
