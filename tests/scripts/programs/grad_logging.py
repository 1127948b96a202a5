"""Gradient norms are logged after the step, and the model is moved and shared while gradients are still there."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
torch.manual_seed(1 + rank)
losses, norms = [], []
for step in range(12):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    if step % 4 == 3:
        model.eval().to("cpu")
        model.train()
    losses.append(loss.item())
model.share_memory()
seen = nn.Parameter(torch.tensor(norms))
