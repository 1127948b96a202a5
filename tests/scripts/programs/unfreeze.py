"""Fine-tuning: first the head alone, then the body joins by add_param_group, as fastai and torchvision do it."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
body, head = nn.Linear(6, 20), nn.Linear(20, 1)
model = nn.Sequential(body, nn.ReLU(), head)
for p in body.parameters():
    p.requires_grad = False
optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, head.parameters(), lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for step in range(20):
    if step == 8:
        for p in body.parameters():
            p.requires_grad = True
        optimizer.add_param_group({"params": body.parameters(), "lr": 1e-3})
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
