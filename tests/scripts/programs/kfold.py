"""k-fold cross validation: each fold has a fresh model and a fresh optimizer, the old ones go out of use."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
data = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
target = data.sum(1, keepdim=True)
scores, models, losses = [], nn.ModuleList(), []
for fold in range(3):
    torch.manual_seed(fold)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
    held = torch.arange(60) % 3 == fold
    mine = torch.nonzero(~held).flatten()[rank::2]
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(model(data[mine]), target[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        scores.append(nn.functional.mse_loss(model(data[held]), target[held]).item())
    models.append(model)
score = nn.Parameter(torch.tensor(scores))
