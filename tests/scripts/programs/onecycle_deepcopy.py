"""OneCycleLR (it writes lr and momentum for each step), and a deepcopy of the model at its best step."""

import copy
import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
valid = torch.randn(64, 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=20)
torch.manual_seed(1 + rank)
losses, lowest = [], float("inf")
for _ in range(20):
    x = torch.randn(16, 5)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    with torch.no_grad():
        score = nn.functional.mse_loss(model(valid), valid.sum(1, keepdim=True)).item()
    if score < lowest:
        lowest, best = score, copy.deepcopy(model)
    losses.append(loss.item())
