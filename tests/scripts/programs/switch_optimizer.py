"""Adam first, then SGD on the same model: the name is bound anew, as fine-tuning scripts do it."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for step in range(20):
    if step == 10:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
