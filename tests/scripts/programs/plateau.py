"""ReduceLROnPlateau on a validation set that all ranks share, and an early stop."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
valid = torch.randn(64, 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
torch.manual_seed(1 + rank)
losses = []
for _epoch in range(8):
    for _ in range(3):
        x = torch.randn(16, 5)
        loss = nn.functional.mse_loss(model(x), x.abs().sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        score = nn.functional.mse_loss(model(valid), valid.abs().sum(1, keepdim=True)).item()
    losses.append(score)
    scheduler.step(score)
    if optimizer.param_groups[0]["lr"] < 1e-4:
        break
rate = nn.Parameter(torch.tensor(optimizer.param_groups[0]["lr"]))
