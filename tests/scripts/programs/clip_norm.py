"""clip_grad_norm_ between backward and step; the norm decides about what is logged."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
torch.manual_seed(1 + rank)
losses, norms = [], []
for _ in range(25):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True) * 3)
    optimizer.zero_grad()
    loss.backward()
    #: mean optimizer
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
    optimizer.step()
    losses.append(loss.item())
norm = torch.nn.ParameterList([torch.tensor(norms)])
