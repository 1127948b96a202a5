"""The script keeps a buffer for each gradient, zeroes it by itself and clips: every rank sees the mean."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
buffers = [torch.zeros_like(p) for p in model.parameters()]
for p, buffer in zip(model.parameters(), buffers):
    p.grad = buffer
torch.manual_seed(1 + rank)
losses = []
for _ in range(12):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    for buffer in buffers:
        buffer.zero_()
    loss.backward()
    #: mean optimizer
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    losses.append(loss.item())
